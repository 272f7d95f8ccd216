"""Print the size of the kit's Python code, by folder: `python -m tools.sizes`.

Code lines are lines without blanks, comments and docstrings.
"""

import ast
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("dimaskdino", "dimaskdino/modeling", "dimaskdino/training", "tools", "tests", "ops")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def measure(file: Path) -> dict[str, int]:
    """Count the lines, code lines, comment-only lines and comprehensions of a file."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    comprehensions, not_code = 0, {number for number, line in enumerate(lines, 1) if not line.strip()}
    for node in ast.walk(ast.parse(text)):
        comprehensions += isinstance(node, COMPREHENSIONS)
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            not_code |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    comments = set()
    with tokenize.open(file) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
                comments.add(token.start[0])
    code = len(lines) - len(not_code | comments)
    return {"lines": len(lines), "code": code, "comments": len(comments), "comprehensions": comprehensions}


def main() -> None:
    """Print a table of all folders."""
    print("| folder | files | lines | code lines | comment-only lines | comprehensions per 100 code lines |")
    print("|---|---|---|---|---|---|")
    for folder in FOLDERS:
        files = sorted((ROOT / folder).rglob("*.py"))
        total = dict.fromkeys(("lines", "code", "comments", "comprehensions"), 0)
        for file in files:
            for key, value in measure(file).items():
                total[key] += value
        density = 100 * total["comprehensions"] / total["code"]
        share = total["comments"] / total["lines"]
        print(f"| {folder} | {len(files)} | {total['lines']:,} | {total['code']:,} | {share:.1%} | {density:.1f} |")


if __name__ == "__main__":
    main()
