"""Code bundles: every local module that code imports, found without running it, as a tar that only names and bytes change."""

from __future__ import annotations

import os
import random
import tarfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.bundle import collect, write_tar
from recipes.errors import RecipeError
from tasks.code import load_callable
from tests.unit.recipes.recipe_text import sha256


def project(folder: Path, **files: str) -> Path:
    """Write files (`__` in a name stands for `/`), and return the folder."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ("" if name.endswith("txt") else ".py"))
        path = path.with_name(path.name.replace("_init", "__init__").replace("_txt", ".txt"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def members(folder, entry="model.py", include=(), root=None):
    return list(collect(folder / entry, "build", root or folder, include).members)


def fault(folder, entry="model.py", function="build", include=()):
    with pytest.raises(RecipeError) as caught:
        collect(folder / entry, function, folder, include)
    (found,) = caught.value.faults
    return str(found).replace(f"{folder}/", "").replace(str(folder), ".")


BUILD = "def build():\n    return 1\n"

IMPORTS = {
    "import": ("import layers", ["layers.py"]),
    "import as": ("import layers as l", ["layers.py"]),
    "from": ("from layers import Layer", ["layers.py"]),
    "in a function": ("def f():\n    import layers", ["layers.py"]),
    "in a method of a class": ("class A:\n    def f(self):\n        if self:\n            import layers", ["layers.py"]),
    "in a try": ("try:\n    import fast_layers\nexcept ImportError:\n    import layers", ["layers.py"]),
    "in a lambda": ("f = lambda: __import__('layers')", ["layers.py"]),
    "import_module": ("import importlib\nm = importlib.import_module('layers')", ["layers.py"]),
    "import_module by name": ("from importlib import import_module\nm = import_module(name='pkg.inner')", ["pkg/__init__.py", "pkg/inner.py"]),
    "package": ("import pkg", ["pkg/__init__.py"]),
    "module of a package": ("import pkg.inner", ["pkg/__init__.py", "pkg/inner.py"]),
    "module from a package": ("from pkg import inner", ["pkg/__init__.py", "pkg/inner.py"]),
    "name from a package": ("from pkg import something", ["pkg/__init__.py"]),
    "deep": ("from pkg.deep.end import x", ["pkg/__init__.py", "pkg/deep/__init__.py", "pkg/deep/end.py", "pkg/inner.py"]),
    "star with __all__": ("from pkg.star import *", ["pkg/__init__.py", "pkg/star/__init__.py", "pkg/star/one.py"]),
    "folder without __init__": ("import space.inside", ["space/inside.py"]),
    "several at once": ("import os, layers, pkg.inner", ["layers.py", "pkg/__init__.py", "pkg/inner.py"]),
    "only for type checkers": ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import layers", []),
    "typing.TYPE_CHECKING and else": ("import typing\nif typing.TYPE_CHECKING:\n    import pkg\nelse:\n    import layers", ["layers.py"]),
    "in a string": ("text = 'import layers'", []),
    "dynamic": ("import importlib\nname = 'layers'\nm = importlib.import_module(name)", []),
    "no module name": ("import importlib\nm = importlib.import_module('../layers')", []),
    "standard library": ("import os.path, json\nfrom collections import abc", []),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPORTS)
def test_local_modules_are_found(tmp_path, name):
    text, expected = IMPORTS[name]
    project(
        tmp_path,
        model=f"{text}\n\n{BUILD}",
        layers="",
        pkg___init="something = 1",
        pkg__inner="",
        pkg__deep___init="",
        pkg__deep__end="from ..inner import y\nfrom . import nothing",
        pkg__star___init="__all__ = ['one', 'absent']",
        pkg__star__one="",
        pkg__star__two="",
        space__inside="",
    )
    assert members(tmp_path) == sorted([*expected, "model.py"])


def test_packages_are_what_is_neither_here_nor_in_the_standard_library(tmp_path):
    project(
        tmp_path,
        model=f"""
        from __future__ import annotations
        import os, torch.nn as nn
        from transformers.models.vit import x
        import layers
        try:
            import apex
        except ImportError:
            apex = None
        if __name__ == "__main__":
            import __main__
        def late():
            import scipy.signal
        {textwrap.indent(BUILD, " " * 8).strip()}
        """,
        layers="import numpy as np\nimport torch\n",
    )
    assert collect(tmp_path / "model.py", "build", tmp_path, ()).packages == (
        "apex", "numpy", "scipy", "torch", "transformers",
    )  # fmt: skip


def test_code_inside_a_package_keeps_its_import_name(tmp_path):
    project(
        tmp_path,
        net___init="",
        net__models___init="from .. import shared",
        net__models__model=f"from . import blocks\nfrom ..shared import x\nfrom ...above import y\n{BUILD}",
        net__models__blocks="",
        net__shared="",
        above="",
    )
    bundle = collect(tmp_path / "net/models/model.py", "build", tmp_path, ())
    assert bundle.entry == "net.models.model:build"
    assert list(bundle.members) == [
        "net/__init__.py", "net/models/__init__.py", "net/models/blocks.py", "net/models/model.py", "net/shared.py",
    ]  # fmt: skip


def test_a_package_may_be_the_entry(tmp_path):
    project(tmp_path, net___init=f"from .inner import x\n{BUILD}", net__inner="x = 1")
    bundle = collect(tmp_path / "net/__init__.py", "build", tmp_path, ())
    assert bundle.entry == "net:build"
    assert list(bundle.members) == ["net/__init__.py", "net/inner.py"]


def test_the_codes_own_folder_comes_before_the_recipes(tmp_path):
    project(
        tmp_path,
        code__model=f"import layers, shared\n{BUILD}",
        code__layers="# the code's",
        layers="# the recipe's",
        shared="import more",
        more="",
    )
    bundle = collect(tmp_path / "code/model.py", "build", tmp_path, ())
    assert list(bundle.members) == ["layers.py", "model.py", "more.py", "shared.py"]
    assert bundle.members["layers.py"] == tmp_path / "code/layers.py"


def test_a_local_module_hides_one_of_the_standard_library(tmp_path):
    project(tmp_path, model=f"import random\n{BUILD}", random="")
    assert members(tmp_path) == ["model.py", "random.py"]


def test_modules_may_import_each_other(tmp_path):
    project(tmp_path, model=f"import layers\n{BUILD}", layers="import model")
    assert members(tmp_path) == ["layers.py", "model.py"]


@pytest.mark.parametrize(
    "text",
    [
        BUILD, "async def build(): ...", "class build: ...", "build = 1", "build: int = 1", "a, (build, c) = x",
        "from layers import build", "import layers as build", "if x:\n    pass\nelse:\n    def build(): ...",
        "try:\n    import a\nexcept E:\n    build = 1", "with x:\n    build = 1", "from layers import *",
        "def __getattr__(name): ...",
    ],
)  # fmt: skip
def test_callables_are_found_at_the_top_level(tmp_path, text):
    project(tmp_path, model=text, layers="")
    assert collect(tmp_path / "model.py", "build", tmp_path, ()).entry == "model:build"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def bild(): ...\ndef _hidden(): ...", "model.py: has no 'build' at its top level (did you mean 'bild'? there: bild)"),
        ("class A:\n    def build(self): ...", "model.py: has no 'build' at its top level (there: A)"),
        ("", "model.py: has no 'build' at its top level (there: nothing)"),
        ("def f(:\n", "model.py:1: syntax error: invalid syntax"),
        ("x = 1\n  y = 2", "model.py:2: syntax error: unexpected indent"),
        ("x = 1\0", "model.py: cannot be parsed as Python: source code string cannot contain null bytes"),
        ("# coding: nonsense\n", "model.py: syntax error: unknown encoding: nonsense"),
        ("x = " + "(" * 5000, "model.py:1: syntax error: too many nested parentheses"),
    ],
)  # fmt: skip
def test_faults_of_the_code(tmp_path, text, message):
    project(tmp_path, model=text)
    assert fault(tmp_path) in (
        message,
        message.replace("model.py:", "model.py:1:", 1),
        message.replace("cannot be parsed as Python", "syntax error"),
    )


@pytest.mark.parametrize(("name", "entry"), [("tasks", "model.py"), ("recipes__model", "recipes/model.py")])
def test_a_module_that_enginerys_own_would_hide_is_a_fault(tmp_path, name, entry):
    """Python would import Enginery's package of that name, which is loaded already where the code runs."""
    root, _, rest = name.partition("__")
    init = {f"{root}___init": ""} if rest else {}
    project(tmp_path, **{"model": f"import {root}\n{BUILD}", name: BUILD, **init})
    file = f"{root}.py" if not rest else f"{root}/__init__.py"
    found = fault(tmp_path, entry=entry)
    assert found == f"{file}: a package of Enginery is named {root!r}, and hides this module where it runs: rename it"


def test_an_expression_too_deep_for_the_parser(tmp_path):
    project(tmp_path, model="x = " + "-" * 100_000 + "1")
    assert "model.py" in fault(tmp_path)


def test_invalid_escapes_are_no_fault(tmp_path):
    """Warnings of the parser are the author's to see, when the code runs; here they are errors of this test suite."""
    project(tmp_path, model=f"x = '\\d'\n{BUILD}")
    assert members(tmp_path) == ["model.py"]


def test_files_that_are_not_there(tmp_path):
    project(tmp_path, models=BUILD)
    assert fault(tmp_path) == "model.py: no such file (did you mean 'models.py'?)"
    assert fault(tmp_path, ".") == ".: is a folder; expected a Python file"
    (tmp_path / "a.b.py").write_text(BUILD)
    assert fault(tmp_path, "a.b.py") == "a.b.py: 'a.b.py' cannot be imported; leave the dots out of its name"


def test_included_files_keep_their_place(tmp_path):
    project(
        tmp_path,
        code__model=f"import layers\n{BUILD}",
        code__layers="",
        code__words_txt="words",
        code__plugins__one="import helper",
        code__helper="",
        shared__more_txt="more",
    )
    (tmp_path / "code/plugins/__pycache__").mkdir()
    (tmp_path / "code/plugins/__pycache__/one.pyc").write_bytes(b"x")
    (tmp_path / "code/plugins/.hidden").write_text("x")
    found = members(tmp_path, "code/model.py", ["code/*.txt", "code/plugins", "shared/**/*.txt", "code/layers.py"])
    assert found == ["helper.py", "layers.py", "model.py", "plugins/one.py", "shared/more.txt", "words.txt"]


def test_globs_that_take_nothing_or_too_much(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x.txt").write_text("x")
    folder = project(tmp_path / "recipe", model=BUILD)
    assert fault(folder, include=["*.csv"]) == "model.py: include: '*.csv' matches no file in ."
    assert fault(folder, include=["../outside/*"]) == (
        "model.py: include: '../outside/*' takes x.txt, which is neither in the code's folder nor in the recipe's"
    )
    large = folder / "weights.bin"
    with large.open("wb") as stream:
        stream.truncate((512 << 20) + 1)
    assert fault(folder, include=["*.bin"]) == (
        "model.py: include: '*.bin' takes too much: at most 10000 files and 512 MiB travel with the code "
        "(weights and data are named in the recipe)"
    )


def test_too_many_files(tmp_path):
    project(tmp_path, model=BUILD)
    (tmp_path / "many").mkdir()
    for index in range(10_000):
        (tmp_path / f"many/{index}.txt").touch()
    assert "'many' takes too much: at most 10000 files" in fault(tmp_path, include=["many"])


# ---- the tar ---------------------------------------------------------------------------------------------------------


def test_the_tar_is_what_was_promised(tmp_path):
    project(tmp_path, model=f"import pkg.inner\n{BUILD}", pkg___init="", pkg__inner="x = 1")
    (tmp_path / "pkg/inner.py").chmod(0o600)
    bundle = collect(tmp_path / "model.py", "build", tmp_path, ())
    target = tmp_path / "code.tar"
    write_tar(bundle, target)
    assert sha256(target.read_bytes()) == bundle.digest
    assert target.stat().st_size == bundle.size
    with tarfile.open(target, "r:") as archive:
        infos = archive.getmembers()
        assert [info.name for info in infos] == ["model.py", "pkg/__init__.py", "pkg/inner.py"]
        assert {(info.mode, info.mtime, info.uid, info.gid, info.uname, info.gname) for info in infos} == {
            (0o644, 0, 0, 0, "", "")
        }
        assert all(info.isreg() for info in infos)
        for info in infos:
            content = archive.extractfile(info).read()
            assert sha256(content) == bundle.digests[info.name]
            assert content == bundle.members[info.name].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.tar", "model.py", "pkg"]


def test_the_bundle_runs_where_it_is_unpacked(tmp_path):
    """The code finds its modules and its data in the tar, and nowhere else."""
    project(
        tmp_path / "recipe",
        code__model="""
        from pathlib import Path
        from parts import scale
        def build(x=2):
            return scale(x) * int(Path(__file__).with_name("factor.txt").read_text())
        """,
        code__parts___init="from parts.inner import scale",
        code__parts__inner="def scale(x):\n    from late import one\n    return x + one\n",
        late="one = 1",
        code__factor_txt="10",
    )
    bundle = collect(tmp_path / "recipe/code/model.py", "build", tmp_path / "recipe", ["code/*.txt"])
    write_tar(bundle, tmp_path / "code.tar")
    (tmp_path / "recipe").rename(tmp_path / "gone")
    assert load_callable(tmp_path / "code.tar", bundle.entry)(4) == 50


@pytest.mark.parametrize("length", [100, 101, 150, 200, 240])
def test_long_names(tmp_path, length):
    name = ("d" * 50 + "/") * 4 + "x" * 60
    name = name[:length] if length != 150 else "é" * 24 + "/" + name[:100]
    project(tmp_path, model=BUILD)
    path = tmp_path / f"{name.rstrip('/')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("long")
    bundle = collect(tmp_path / "model.py", "build", tmp_path, ["**/*.txt"])
    write_tar(bundle, tmp_path / "code.tar")
    with tarfile.open(tmp_path / "code.tar") as archive:
        assert path.relative_to(tmp_path).as_posix() in archive.getnames()


def test_names_too_long_for_a_tar(tmp_path):
    project(tmp_path, model=BUILD)
    path = tmp_path / ("d" * 120) / ("x" * 150 + ".txt")
    path.parent.mkdir()
    path.write_text("")
    with pytest.raises(RecipeError, match="too long for an archive"):
        collect(tmp_path / "model.py", "build", tmp_path, ["**/*.txt"])


def test_code_that_changed_since_is_not_written(tmp_path):
    project(tmp_path, model=f"import layers\n{BUILD}", layers="x = 1")
    bundle = collect(tmp_path / "model.py", "build", tmp_path, ())
    for text in ("x = 2", "x = 10000"):
        (tmp_path / "layers.py").write_text(text)
        with pytest.raises(RecipeError, match=r"layers\.py: changed since the build was planned; run it again"):
            write_tar(bundle, tmp_path / "code.tar")
    (tmp_path / "layers.py").unlink()
    with pytest.raises(RecipeError, match=r"layers\.py: is gone since the build was planned"):
        write_tar(bundle, tmp_path / "code.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.py"]


def test_each_thing_in_the_bundle_changes_the_digest(tmp_path):
    def digest():
        return collect(tmp_path / "model.py", "build", tmp_path, ["*.txt"]).digest

    project(tmp_path, model=f"import layers\n{BUILD}", layers="x = 1", words_txt="a")
    seen = {digest()}
    (tmp_path / "layers.py").write_text("x = 2")
    seen.add(digest())
    (tmp_path / "words.txt").write_text("b")
    seen.add(digest())
    (tmp_path / "words.txt").rename(tmp_path / "terms.txt")
    seen.add(digest())
    (tmp_path / "model.py").write_text(f"import layers  # now\n{BUILD}")
    seen.add(digest())
    (tmp_path / "unrelated.py").write_text("import nothing")
    (tmp_path / "layers.py").touch()
    assert digest() in seen
    assert len(seen) == 5


FOLDERS = st.text("abcdefgh-_. é", min_size=1, max_size=12).filter(lambda name: name.strip(". ") == name)


@given(FOLDERS, FOLDERS, FOLDERS, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_renaming_folders_and_working_elsewhere_changes_no_digest(
    tmp_path_factory, monkeypatch, recipe, code, working, relative, choose: random.Random
):
    """Neither the recipe's folder nor the code's, nor the working directory, nor the order of files on disk enters."""
    texts = {
        "model": f"import layers, shared\nfrom pkg import inner\n{BUILD}",
        "layers": "import torch",
        "pkg___init": "",
        "pkg__inner": "from . import other",
        "pkg__other": "",
        "words_txt": "a",
    }
    plain = project(
        tmp_path_factory.mktemp("plain"), shared="", **{f"code__{name}": text for name, text in texts.items()}
    )
    expected = collect(plain / "code/model.py", "build", plain, ["code/*.txt"])
    folder = tmp_path_factory.mktemp("renamed")
    names = list(texts)
    choose.shuffle(names)
    for name in names:
        project(folder / recipe / code, **{name: texts[name]})
    project(folder / recipe, shared="")
    here = folder / working / "deep"
    here.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    root = Path(os.path.relpath(folder / recipe, here)) if relative else folder / recipe
    found = collect(root / code / "model.py", "build", root, [f"{code}/*.txt"])
    assert (found.digest, found.size, found.entry) == (expected.digest, expected.size, expected.entry)
    assert found.digests == expected.digests
    assert found.packages == expected.packages
