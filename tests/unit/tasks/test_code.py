import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tasks.code import load_callable, recipe_code
from tasks.errors import BackendError, ModelCodeError
from tests.unit.tasks.bundles import code_tar as bundle


@pytest.fixture(autouse=True)
def _restored_interpreter():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_it_imports_its_own_packages_and_reads_files_beside_it(tmp_path):
    tar = bundle(
        tmp_path,
        {
            "pkg/model.py": """
                from pathlib import Path
                from pkg.inner import twice
                def build(value, *, add=0):
                    return twice(value) + add + int(Path(__file__).with_name("n.txt").read_text())
            """,
            "pkg/inner.py": "def twice(x): return 2 * x\n",
            "pkg/n.txt": "100",
        },
    )
    assert load_callable(tar, "pkg.model:build")(3, add=1) == 107


def test_two_bundles_may_both_have_a_module_of_one_name(tmp_path):
    for value in (1, 2):
        folder = tmp_path / str(value)
        folder.mkdir()
        tar = bundle(folder, {"model.py": "from part import V\ndef f(): return V\n", "part.py": f"V = {value}\n"})
        assert load_callable(tar, "model:f")() == value


def test_the_traceback_holds_only_the_recipes_frames_and_no_folder_of_this_machine(tmp_path):
    tar = bundle(
        tmp_path,
        {
            "model.py": """
                import layers
                def build():
                    return layers.make("x")
            """,
            "layers.py": """
                import json
                def make(text):
                    try:
                        return json.loads(text)
                    except ValueError as err:
                        raise RuntimeError(f"cannot make from {__file__}") from err
            """,
        },
    )
    with pytest.raises(ModelCodeError) as caught:
        load_callable(tar, "model:build")()
    text = str(caught.value)
    assert 'File "model.py", line 4, in build' in text
    assert 'File "layers.py", line 7, in make' in text
    assert text.endswith("RuntimeError: cannot make from layers.py")
    assert "json.decoder.JSONDecodeError" in text
    assert "json/__init__" not in text
    assert "tasks/code.py" not in text
    assert "enginery-code-" not in text


def test_an_error_below_the_recipes_code_names_the_module_that_raised(tmp_path):
    tar = bundle(tmp_path, {"model.py": "import json\ndef build():\n    return json.loads('x')\n"})
    with pytest.raises(ModelCodeError, match=r"(?s)line 3, in build.*\(raised inside json\.decoder\)"):
        load_callable(tar, "model:build")()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def build(:\n", r'(?s)importing model: .*File "model.py", line 1.*SyntaxError'),
        ("import not_there_at_all\n", r"No module named 'not_there_at_all'"),
        ("raise SystemExit(3)\n", r"(?s)importing model: .*SystemExit: 3"),
        ("build = 3\n", r"expected a callable named 'build', found a int"),
        ("def biuld(): pass\n", r"found nothing \(callables there: biuld\)"),
    ],
)
def test_code_that_cannot_be_loaded_says_why(tmp_path, source, expected):
    with pytest.raises(ModelCodeError, match=expected):
        load_callable(bundle(tmp_path, {"model.py": source}), "model:build")


def test_a_file_hidden_by_a_built_in_module_is_named(tmp_path):
    tar = bundle(tmp_path, {"math.py": "def build(): pass\n"})
    with pytest.raises(ModelCodeError, match="math: Python has another module of that name"):
        load_callable(tar, "math:build")


def test_errors_of_enginery_pass_through_recipe_code():
    with pytest.raises(BackendError, match="ours"), recipe_code("doing"):
        raise BackendError("bad data", "ours")


@pytest.mark.parametrize("attack", ["../escaped.py", "/tmp/enginery-escaped.py", "link", "hardlink", "device"])
def test_a_tar_that_would_write_elsewhere_is_refused(tmp_path, attack):
    path = tmp_path / "code.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(attack)
        if attack in ("link", "hardlink"):
            member.type = tarfile.SYMTYPE if attack == "link" else tarfile.LNKTYPE
            member.linkname = "/etc/passwd"
        elif attack == "device":
            member.type = tarfile.CHRTYPE
        archive.addfile(member, io.BytesIO(b""))
    with pytest.raises(BackendError, match="refused to unpack"):
        load_callable(path, "model:build")
    assert not (tmp_path.parent / "escaped.py").exists()
    assert not Path("/tmp/enginery-escaped.py").exists()


def test_a_damaged_tar_is_bad_data(tmp_path):
    path = bundle(tmp_path, {"model.py": "def build(): pass\n" * 200})
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(BackendError, match="not a readable tar"):
        load_callable(path, "model:build")


def test_the_unpacked_folder_is_gone_when_the_process_ends(tmp_path):
    tar = bundle(tmp_path, {"model.py": "def build(): return __file__\n"})
    program = (
        "import sys; from pathlib import Path; from tasks.code import load_callable; "
        "print(load_callable(Path(sys.argv[1]), 'model:build')())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tar)], capture_output=True, text=True, check=True)
    unpacked = Path(done.stdout.strip())
    assert unpacked.name == "model.py"
    assert not unpacked.exists()
    assert not unpacked.parent.exists()
