"""The modules of the tab are joined to one."""

import re

from tightrope.search.report.module import STATIC, script


def test_every_module_stands_in_it_once_and_none_is_imported() -> None:
    joined = script()
    assert "import {" not in joined
    for path in STATIC.glob("*.js"):
        assert joined.count(path.read_text().splitlines()[0]) == 1  # the line that says what it is


def test_only_the_entry_is_exported() -> None:
    assert re.findall(r"^export .*", script(), re.MULTILINE) == ["export async function render() {"]


def test_no_name_is_defined_twice() -> None:
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", script(), re.MULTILINE)
    names += [n for found in re.findall(r"^const \[([\w, ]+)\]", script(), re.MULTILINE) for n in found.split(", ")]
    assert len(names) == len(set(names)) > 40


def test_what_is_used_before_it_is_defined_is_no_base_class() -> None:
    joined = script()
    for base in re.findall(r"^class \w+ extends (\w+)", joined, re.MULTILINE):
        assert joined.index(f"class {base} ") < joined.index(f" extends {base} ")
