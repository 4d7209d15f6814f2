"""Compile the modules of the hot path, from the sources that also run as they are.

    python speed/build.py [directory]       default: sharedpool/compiled

Each module's constants (whole numbers of layout.py and its own) are written into its code, then Cython compiles it with
the types of speed/MODULE.pxd. Nothing else is changed: what the tests prove of table.py is what is compiled. Where
there is no C compiler the package works without, at about half the speed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

#: The C compiler's. -O2 takes 80 s of a processor, -O0 30: enough to see on one more Python that everything works.
LEVEL = os.environ.get("SHAREDPOOL_BUILD_LEVEL", "-O2")
HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "sharedpool"
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": True,
    "wraparound": False,
    "initializedcheck": False,
    "annotation_typing": False,
    "cdivision": True,
}


def modules() -> list[str]:
    """The modules that have types."""
    return sorted({path.stem for path in HERE.glob("*.p[xy][dx]")} - {"memory", "clock"})


def constants() -> dict[str, int]:
    """The whole numbers of layout.py by name."""
    spec = importlib.util.spec_from_file_location("sharedpool_layout", PACKAGE / "layout.py")
    assert spec is not None and spec.loader is not None
    layout: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = layout  # dataclasses look their module up
    spec.loader.exec_module(layout)
    return {name: value for name, value in vars(layout).items() if name.isupper() and type(value) is int}


class _Edits(ast.NodeVisitor):
    """Puts numbers in the place of their names, and leaves out the imports that the types bring.

    The text is changed in place, line by line, so that tracebacks name the lines of the source.
    """

    def __init__(self, source: str, numbers: dict[str, int], imported_by_types: set[str], classes: set[str]) -> None:
        self.lines = source.splitlines()
        self.numbers = numbers
        self.classes = classes
        self.left_out = set(numbers) | imported_by_types
        self.edits: list[tuple[int, int, int, str]] = []  # line, from, to, text
        self.visit(ast.parse(source))
        for line, start, stop, text in sorted(self.edits, reverse=True):
            encoded = self.lines[line].encode()  # columns are counted in bytes
            self.lines[line] = (encoded[:start] + text.encode() + encoded[stop:]).decode()

    def _replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        if node.lineno == node.end_lineno:
            self.edits.append((node.lineno - 1, node.col_offset, node.end_col_offset, text))
            return
        self.lines[node.lineno - 1 : node.end_lineno] = [text] + [""] * (node.end_lineno - node.lineno)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and self.numbers.get(node.id, -1) >= 0:
            value = self.numbers[node.id]
            self._replace(node, str(value) if value < 1 << 31 else f"cython.cast(cython.ulonglong, {value:#x})")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A compiled class has no generic base; subscribing it gives it back."""
        self.generic_visit(node)
        generic = [base for base in node.bases if isinstance(base, ast.Subscript) and _named(base.value, "Generic")]
        if node.name in self.classes and generic:
            self._replace(generic[0], "")
            assert node.end_lineno is not None
            self.lines.append("")  # where the class is the last
            assert not self.lines[node.end_lineno], "a class is followed by an empty line"
            self.lines[node.end_lineno] = "    def __class_getitem__(cls, item): return cls"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "__future__":
            self._replace(node, ast.unparse(node) + "; import cython")
        elif any(name.name in self.left_out for name in node.names):
            node.names = [name for name in node.names if name.name not in self.left_out]
            self._replace(node, ast.unparse(node) if node.names else "pass")


def _named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def own_constants(tree: ast.Module, known: dict[str, int]) -> dict[str, int]:
    """Whole numbers that the module itself lays down: `NAME: Final = MASK64 & ~STATE`."""
    found: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            try:
                value = eval(ast.unparse(node.value), {"__builtins__": {}}, {**known, **found})  # noqa: S307 - our own
            except (NameError, TypeError, SyntaxError):
                continue
            if type(value) is int and node.target.id.lstrip("_").isupper():
                found[node.target.id] = value
    return found


def prepared(name: str) -> str:
    """A module's source as Cython gets it."""
    source = (PACKAGE / f"{name}.py").read_text()
    types = (HERE / f"{name}.pxd").read_text()
    imported = {
        word for line in re.findall(r"^from sharedpool.* cimport (.*)$", types, re.M) for word in line.split(", ")
    }
    classes = set(re.findall(r"^cdef class (\w+)", types, re.M))
    known = constants()
    numbers = {**known, **own_constants(ast.parse(source), known)}
    return "\n".join(_Edits(source, numbers, imported, classes).lines) + "\n"


def _lay_out(scratch: Path) -> dict[str, Path]:
    """Sources and types as a package in `scratch`; gives the sources by module."""
    package = scratch / "sharedpool"
    package.mkdir()
    (package / "__init__.py").touch()
    for path in HERE.glob("*.p[xy][dx]"):
        shutil.copy(path, package)
    sources = {}
    for name in modules():
        sources[name] = package / f"{name}.pyx"
        if not sources[name].exists():
            sources[name] = package / f"{name}.py"
            sources[name].write_text(prepared(name))
    return sources


def translated(name: str, scratch: Path) -> str:
    """A module as C."""
    from Cython.Build import cythonize

    source = _lay_out(scratch)[name]
    cythonize([str(source)], compiler_directives=DIRECTIVES, include_path=[str(scratch)], quiet=True)
    return source.with_suffix(".c").read_text()


def build(target: Path) -> list[Path]:
    """Compile every module that has types into `target`; gives the files."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        options = [LEVEL, "-g0", "-Wno-sign-compare", "-Wno-discarded-qualifiers"]  # Cython: a volatile local variable
        extensions = [
            Extension(f"sharedpool.{name}", [str(source)], extra_compile_args=options)
            for name, source in _lay_out(scratch).items()
        ]
        made = cythonize(extensions, compiler_directives=DIRECTIVES, include_path=[directory], quiet=True, nthreads=2)
        command = build_ext(Distribution({"ext_modules": made}))
        command.build_lib = command.build_temp = str(scratch / "out")
        command.parallel = 2
        command.ensure_finalized()
        command.run()
        names = [f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in modules()]
        return [Path(shutil.copy(scratch / "out" / "sharedpool" / name, target / name)) for name in names]


def state() -> str:
    """A hash of everything that is compiled, and of how."""
    paths = [*HERE.glob("*.p*"), PACKAGE / "layout.py", *(PACKAGE / f"{name}.py" for name in modules())]
    parts = [LEVEL.encode(), *(path.read_bytes() for path in sorted(set(paths)) if path.exists())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def main() -> None:
    """Compile into the source tree, unless that was done with these sources."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE / "compiled"
    stamp = target / f"{sys.implementation.cache_tag}.stamp"
    if stamp.exists() and stamp.read_text() == state():
        stamp.touch()  # sources may be newer without being others
        return
    stamp.unlink(missing_ok=True)
    for path in target.glob(f"*.{sys.implementation.cache_tag}-*"):
        path.unlink()
    print("compiling the hot path for", sys.implementation.cache_tag, flush=True)
    build(target)
    stamp.write_text(state())


if __name__ == "__main__":
    main()
