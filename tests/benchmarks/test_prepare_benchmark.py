"""The benchmark of `prepare`, run whole on a toy corpus: every variant runs, the figures hang together."""

import json
import subprocess

from tests.launch import ROOT, forking_python

PROGRAM = ROOT / "tools" / "benchmarks" / "prepare.py"


def test_a_tokenizer_of_a_folder_is_taken_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    from prepare import copy_tokenizer

    source = tmp_path / "model"
    source.mkdir()
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    for name in (*kept, "model.safetensors", "model.safetensors.index.json", "config.json"):
        (source / name).write_text("{}")
    copy_tokenizer(source, tmp_path / "tokenizer")
    assert {file.name for file in (tmp_path / "tokenizer").iterdir()} == set(kept)


def test_every_variant_is_measured(tmp_path):
    flags = ["--records", "60", "--workers", "1", "--vocab", "400", "--documents", "3000", "--rounds", "1"]
    command = [forking_python(), str(PROGRAM), *flags, "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["corpora"].keys() == {"long records", "short records"}
    for corpus, figures in result["corpora"].items():
        rates = figures["tokens_per_cpu_second"]
        assert rates.keys() >= {"raw", "raw, fast", "prepare"}
        assert figures["log_q_bytes_per_token"] == 4 and rates["prepare, log q"] > 0
        assert rates["prepare"] == figures["tokens"] / figures["cpu_seconds"]["prepare"][0]
        assert figures["share_of_raw"] == rates["prepare"] / rates["raw"]
        assert (f"hit: {corpus}" in done.stdout) == figures["goal_hit"] == (figures["share_of_raw"] >= 0.9)
    sizes = [figures["tokens"] / figures["records"] for figures in result["corpora"].values()]
    assert sizes[0] > 4 * sizes[1]
    for capacity in ("4096", "32768"):
        shares = result["packing"][capacity]
        assert shares["best_fit_decreasing"] >= shares["first_fit"] > shares["one_record_per_pack"] > 0
