"""The page's style, inline in it. Verdicts and levels of phi differ by sign or line as well as by colour."""

STYLE = """
:root { color-scheme: light; --ink: #1c1f23; --soft: #5c636b; --line: #dfe2e6; --paper: #fff; --wash: #f6f7f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1260px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; }
h3 { font-size: 15.5px; margin: 18px 0 6px; overflow-wrap: anywhere; }
p { margin: 4px 0 10px; max-width: 105ch; }
.soft, small { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 18px 22px;
  margin: 16px 0; }
nav { margin: 10px 0 4px; } nav a { margin-right: 14px; color: #0b5a8f; text-decoration: none; }
nav a:hover { text-decoration: underline; }
img { display: block; width: 100%; height: auto; margin: 6px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 6px 0 10px; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1.5px solid #b9bec4;
  vertical-align: bottom; }
th, td { padding: 4px 10px 4px 0; }
td:first-child { min-width: 11em; }
td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; vertical-align: top; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.se { color: var(--soft); font-size: 12px; }
.own td { color: var(--soft); font-style: italic; }
code, .mono { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: #0b5a8f; }
.badge { display: inline-block; border-radius: 4px; padding: 0 8px; margin-right: 8px; font-size: 12.5px;
  font-weight: 600; white-space: nowrap; }
.badge.problem { background: #b3261e; color: #fff; }
.badge.look { background: #ffe08a; color: #4a3500; }
.badge.ok { background: #d6ebf5; color: #0a4766; }
.badge.unchecked { background: #e6e8ea; color: #444; }
.finding { border-left: 4px solid var(--line); padding: 3px 0 3px 12px; margin: 6px 0; }
.finding.problem { border-color: #b3261e; } .finding.look { border-color: #e0ac00; }
.finding.ok { border-color: #8fc1da; }
.finding > summary { color: var(--ink); } .finding p { margin: 5px 0; max-width: 120ch; }
.finding ul { margin: 2px 0 4px; padding-left: 20px; font-size: 13.5px; }
.small { font-size: 13px; color: var(--soft); } .rest { margin: 6px 0 0 2px; }
h3 .badge { margin: 0 0 0 6px; font-weight: 500; }
.record { border-top: 1px solid var(--line); padding: 10px 0 6px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0; padding: 8px 10px; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; font: 13.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
.text span { border-radius: 3px; box-shadow: inset 0 -1px 0 #eceef0; }
.text span:hover { outline: 1.5px solid #111; }
.legend span { padding: 1px 7px; margin-right: 4px; border-radius: 3px; white-space: nowrap; font-size: 13px;
  border: 1px solid var(--line); }
.text .a1, .legend .a1 { background: #fdebd3; } .text .a2, .legend .a2 { background: #fbcb90; }
.text .a3, .legend .a3 { background: #f09a4e; text-decoration: underline; }
.text .a4, .legend .a4 { background: #9a4300; color: #fff; text-decoration: underline double; }
.text .b1, .legend .b1 { background: #dcebf7; } .text .b2, .legend .b2 { background: #a3cdea; }
.gap { color: var(--soft); font-style: italic; }
@media print { body { background: #fff; } section { border: 0; padding: 8px 0; }
  .text span, .badge, .legend span { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
