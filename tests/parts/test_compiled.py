"""What the C compiler gets: the law of the critical section holds for it, too."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Between trylock and unlock: C's own conversions. Nothing of these runs Python code, looks for signals, or lets go of
#: the GIL. An index beyond the memory ends a section, as in Python, and so a damaged word ends no process.
ALLOWED = re.compile(
    r"__Pyx_\w*(INCREF|DECREF|DECREF_SET|GOTREF)|__Pyx_PyLong_(As|From)_\w+|__Pyx_RaiseBufferIndexError"
    r"|__Pyx_PyObject_Compare\w+|PyErr_Occurred|PyNumber_Negative|sharedpool_(word|mark)|if|(un)?likely|__PYX_ERR|sizeof"
)


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_build", ROOT / "speed" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sections(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The C code of each method of the table, from trylock to unlock."""
    text = build.translated("table", tmp_path_factory.mktemp("c"))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    parts = re.split(r"\nstatic int __pyx_f_\w+?Table_(\w+)\(", text)
    found = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if "PyNumber_Negative" in body:
            begin = body.index("PyNumber_Negative")
            found[name] = body[begin : body.index("PyNumber_Positive", begin)]
    return found


def test_every_section_is_compiled(build: ModuleType, sections: dict[str, str]) -> None:
    source = (ROOT / "sharedpool" / "table.py").read_text()
    methods = re.split(r"\n    def (\w+)", source)
    having = {name for name, body in zip(methods[1::2], methods[2::2], strict=True) if "rc = -mutex" in body}
    assert len(having) > 10
    assert set(sections) == having


def test_nothing_in_a_section_calls_python(sections: dict[str, str]) -> None:
    for name, body in sections.items():
        if name == "repair":  # rebuilds by slices of Python's; it may be interrupted anywhere and is done again
            continue
        called = set(re.findall(r"\b([A-Za-z_]\w+)\s*\(", body))
        assert not {call for call in called if not ALLOWED.fullmatch(call)}, name


def test_no_store_may_be_left_out_or_moved_by_the_compiler(sections: dict[str, str]) -> None:
    for name, body in sections.items():
        if name != "repair":
            assert "(sharedpool_word *)" in body, name
            assert not re.findall(r"\(\s*(?:unsigned )?(?:PY_LONG_LONG|uint64_t|int|long) \*\)", body), name


def test_the_numbers_of_the_layout_stand_in_the_code(build: ModuleType) -> None:
    numbers = set(build.constants())
    assert len(numbers) > 50
    for module in set(build.modules()) - {"_calls", "layout"}:
        tree = ast.parse(build.prepared(module))
        assert not numbers & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, module


def test_what_is_compiled_has_the_lines_of_its_source(build: ModuleType) -> None:
    def functions(text: str) -> list[tuple[str, int]]:
        found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        return [(node.name, node.lineno) for node in found if node.name != "__class_getitem__"]

    for module in set(build.modules()) - {"_calls"}:
        source = (ROOT / "sharedpool" / f"{module}.py").read_text()
        assert functions(build.prepared(module)) == functions(source), module
