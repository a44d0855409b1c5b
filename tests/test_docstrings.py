"""Public docstrings list arguments, attributes and errors in Google sections, in no other form."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_idft"
SECTIONS = re.compile(r"^(Args|Attributes):$", re.M)
RAISES_IN_A_SENTENCE = re.compile(r"\bRaises \w")


def names_of(node: ast.AST) -> set[str]:
    """Of the arguments of a function; of the fields of a class and the arguments of its constructor."""
    if isinstance(node, ast.FunctionDef):
        return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    assert isinstance(node, ast.ClassDef)
    fields = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
    made = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
    return fields.union(*map(names_of, made))


def faults(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    text = ast.get_docstring(node) or ""
    found = RAISES_IN_A_SENTENCE.findall(text)
    if not SECTIONS.search(text):
        listed = re.findall(r"(?:^|[.;] |\n *)([\w, ]+): ", text)
        found += [names for names in listed if names_of(node) & set(re.split(r", ?", names))]
    return found


def test_lists_are_google_sections():
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {found}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if (found := faults(node))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_other_forms_are_found():
    function = '''def cut(size, limit):
    """Cut it.

    {}
    """
'''
    for text in ("limit: the most.", "Done. size, limit: whole numbers.", "Raises ValueError for none."):
        assert faults(ast.parse(function.format(text)).body[0]), text
    assert not faults(ast.parse(function.format("Args:\n        limit: the most.")).body[0])
