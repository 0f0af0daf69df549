"""Packs the modules of a user's residual kind with a checkpoint, as siblings of the model's files, or refuses them."""

import ast
from pathlib import Path
from types import ModuleType

from .. import models
from ..errors import UserError
from ..models import skip_connections, skip_norms

_PACKAGE = models.__name__.partition(".")[0]
_HOMES = (skip_connections, skip_norms)
"""Files of the checkpoint from which a packed module imports names of the package."""
_STANDARD = ("__future__", "collections", "copy", "dataclasses", "functools", "itertools", "math", "typing")
"""Allowed modules of the standard library: they neither read files nor start programs."""


def own_modules(module: ModuleType, taken: set[str]) -> dict[str, str]:
    """The source of a module and of the siblings that it needs, by file name, with imports that a checkpoint has.

    Allowed are imports of torch, transformers, siblings (`from .x import y`), the few modules of [`_STANDARD`], and of
    names of `hf_rskip` that are in [`_HOMES`]: those are rewritten to imports of siblings.

    Args:
        module: that defines the kind.
        taken: names of the files of the model.

    Raises:
        [`UserError`]: if it imports anything else, has the name of one of those files, or is the program itself, which
            would run where it is loaded.
    """
    if module.__name__ == "__main__" or hasattr(module, "__path__"):
        raise UserError(f"The code of {module.__name__} does not travel: move it to a file that is imported.")
    files, waiting = {}, [Path(module.__file__)]
    while waiting:
        path = waiting.pop()
        if not path.is_file():
            raise UserError(f"The module {path} does not travel: it is not a file.")
        if path.name in taken:
            raise UserError(f"The module {path} does not travel, as a file of the model has its name: rename it.")
        files[path.name], siblings = _rewrite(path)
        waiting += [path.with_name(name) for name in sorted(siblings - files.keys())]
    return files


def _rewrite(path: Path) -> tuple[str, set[str]]:
    """The source with imports of siblings, and the file names of those that are beside it."""
    lines, siblings = path.read_text(encoding="utf-8").splitlines(keepends=True), set()
    tree = ast.parse("".join(lines))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    # From the end, so that the positions of earlier nodes stay.
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and "." not in node.module:
            siblings.add(f"{node.module}.py")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] == _PACKAGE:
            statement = "; ".join(_sibling_import(path, node, alias) for alias in node.names)
            first, last = node.lineno - 1, node.end_lineno
            before, after = lines[first].encode()[: node.col_offset], lines[last - 1].encode()[node.end_col_offset :]
            lines[first:last] = [before.decode() + statement + after.decode()]
        else:
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            known = {"torch", "transformers", *_STANDARD}
            if getattr(node, "level", 0) or not {root.partition(".")[0] for root in roots} <= known:
                raise _refusal(path, node)
    return "".join(lines), siblings


def _sibling_import(path: Path, node: ast.ImportFrom, alias: ast.alias) -> str:
    for home in _HOMES:
        if node.module in (_PACKAGE, models.__name__, home.__name__) and hasattr(home, alias.name):
            return ast.unparse(ast.ImportFrom(home.__name__.rpartition(".")[2], [alias], level=1))
    raise _refusal(path, node)


def _refusal(path: Path, node: ast.stmt) -> UserError:
    homes = " or ".join(home.__name__ for home in _HOMES)
    return UserError(
        f"The code in {path} does not travel because of `{ast.unparse(node)}`: it may import torch, transformers, "
        f"{', '.join(_STANDARD[1:])}, `from .sibling import name`, and of {_PACKAGE} what {homes} has, with "
        f"`from {_PACKAGE} import name`"
    )
