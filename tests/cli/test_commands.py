import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rainfusion
from rainfusion import Grid, Text, Tokens, cli
from rainfusion.cli.app import app

SMALL = ["--grid", "5x8x16", "--block", "32", "--heads", "2", "--sparsity", "0.5", "--rounds", "1"]


def command(*arguments):
    """The command in this process: CliRunner for what typer answers."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def main(capfd, monkeypatch, *arguments):
    """The whole command, errors included: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["rainfusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    return ended.value.code, out, err


# -- the entry -------------------------------------------------------------------------------------


def test_version():
    assert command("--version").stdout == f"rainfusion {rainfusion.__version__}\n"


@pytest.mark.parametrize("name", ["devices", "models", "plan", "run", "parity", "calibrate", "budgets", "new-backend"])
def test_every_command_has_help(name):
    answer = command(name, "--help")
    assert answer.exit_code == 0
    assert "--json" in answer.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from rainfusion.cli.app import app; app(['--help'], standalone_mode=False);"
        "print([m for m in ('numpy', 'torch', 'matplotlib', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_typer_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from rainfusion.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "the command needs typer, which is not installed: pip install 'rainfusion[cli]'\n"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rainfusion.cli", "plan", "--grid", "1x1x1", "--sparsity", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: sparsity=2.0 is out of range")
    assert len(done.stderr.splitlines()) == 1


def shell(line, **environment):
    """A command line of a shell, ``rainfusion`` in it: exit status, stdout, stderr."""
    line = line.replace("rainfusion", f"{sys.executable} -m rainfusion.cli")
    environ = {name: text for name, text in {**os.environ, **environment}.items() if text is not None}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], env=environ, capture_output=True, text=True, check=False, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full here")
@pytest.mark.parametrize(
    "arguments", ["plan --grid 2x8x8 --block 16 --sink none", "plan --grid 2x8x8 --sink none --json", "--help"]
)
def test_outputs_that_cannot_be_written(arguments):
    assert shell(f"rainfusion {arguments} | head -c 1")[0] == 0
    code, _, err = shell(f"rainfusion {arguments} > /dev/full")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "No space left" in err
    code, _, err = shell(f"rainfusion {arguments} >&-")
    assert code == 2
    assert err.startswith("error: standard output is closed")
    assert shell(f"rainfusion {arguments} 2>&- >/dev/null")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"COLUMNS": "0"},
        {"COLUMNS": "none", "LINES": "-1"},
        {"HOME": None, "TERM": None},
        {"RAINFUSION_PLUGINS": "", "RAINFUSION_BACKEND": "", "RAINFUSION_OPENVINO_DEVICE": ""},
    ],
    ids=str,
)
def test_odd_environments(environment):
    code, out, err = shell("rainfusion plan --grid 2x8x8 --block 16 --sink none", **environment)
    assert (code, err) == (0, "")
    assert "density" in out


HUGE = "9" * 100_000  # Linux takes a variable of up to 128 KiB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"RAINFUSION_BACKEND": HUGE, "RAINFUSION_PLUGINS": HUGE}, (0, 2)),
        (dict.fromkeys(("RAINFUSION_DISABLED_PLUGINS", "RAINFUSION_OPENVINO_TELEMETRY", "TERM"), HUGE), (0,)),
        ({"RAINFUSION_PLUGIN_SECONDS": HUGE, "RAINFUSION_PROBE_SECONDS": HUGE}, (0,)),
        ({"COLUMNS": HUGE, "LINES": HUGE}, (0,)),
        ({"COLUMNS": "9" * 12}, (0,)),
        ({"COLUMNS": "²"}, (0,)),
    ],
    ids=["backend", "others", "seconds", "terminal", "wide", "digit"],
)
def test_huge_environments(variables, status):
    for arguments in ("--help", "plan --grid 2x4x4 --block 16 --sink none --heads 1 --head-dim 8", "devices"):
        code, out, err = shell(f"rainfusion {arguments}", **variables)
        assert "Traceback" not in err
        assert len(err) < 3000
        assert len(out) < 30_000
        assert code in status


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--seed", "-1"],
        ["run", "carphone", "--start", "9" * 30],
        ["run", "/dev/zero"],
        ["run", "x" * 5000],
        ["run", "a\x1b[31m\n.mp4"],
        ["parity", "--backend", "reference", "--seed", "-1"],
        ["parity", "--backend", "reference", "--cases", "x" * 100_000],
        ["parity", "--compare", "/dev/zero", "/dev/zero"],
        ["parity", "--backend", "x\n" * 3000],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_what_cannot_be_met_is_one_line_of_a_readable_length(capfd, monkeypatch, arguments):
    code, out, err = main(capfd, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err) < 2500
    assert len(err.splitlines()) == 1
    assert err[:-1].isprintable()


def test_an_error_that_nobody_thought_of_is_a_line_and_shows_its_place_on_demand(capfd, monkeypatch):
    monkeypatch.setattr("rainfusion.plugins.probe.devices", lambda isolate: 1 // 0)
    code, _, err = main(capfd, monkeypatch, "devices")
    assert code == 2
    assert err.startswith("error: ZeroDivisionError: ")
    monkeypatch.setenv("RAINFUSION_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


# -- devices ---------------------------------------------------------------------------------------


def test_devices_lists_what_is_here_and_why_the_rest_is_not():
    answer = command("devices")
    assert answer.exit_code == 0
    assert "NumPy on the host" in answer.stdout


def test_devices_as_json():
    rows = json.loads(command("devices", "--json").stdout)
    assert {"backend": "reference", "device": "cpu", "status": "ready"}.items() <= next(
        row for row in rows if row["backend"] == "reference"
    ).items()


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture
def known_models(monkeypatch):
    """Models known to rainfusion: one of this diffusers, one of another, one left alone."""
    pytest.importorskip("diffusers")
    from rainfusion.integrations.diffusers import adapter

    def nothing(model, arguments):
        return ()

    wan = adapter.Adapter("blocks", nothing, family="Wan [2.1]", tested="tiny models")
    later = adapter.Adapter("blocks", nothing, family="Later")
    found = {"WanTransformer3DModel": wan, "LaterTransformer3DModel": later}, {"OtherModel": "its mask is [its own]"}
    monkeypatch.setattr(adapter, "known", lambda: found)


def test_models_lists_what_is_known_and_what_is_left_alone(known_models):
    answer = command("models")
    assert answer.exit_code == 0
    lines = [re.split(r"  +", line.strip()) for line in answer.stdout.splitlines()]
    version = importlib.metadata.version("diffusers")
    assert lines[1:] == [
        ["Later", "LaterTransformer3DModel", f"not in diffusers {version}"],
        ["Wan [2.1]", "WanTransformer3DModel", "known", "tiny models"],
        ["OtherModel", "left alone", "its mask is [its own]"],
    ]


def test_models_as_json(known_models):
    record = json.loads(command("models", "--json").stdout)
    assert record["diffusers"] == importlib.metadata.version("diffusers")
    assert record["models"][1] == {
        "family": "Wan [2.1]",
        "model": "WanTransformer3DModel",
        "installed": True,
        "tested": "tiny models",
        "left_alone": None,
    }
    assert [one["left_alone"] for one in record["models"]] == [None, None, "its mask is [its own]"]


def test_models_that_are_registered():
    pytest.importorskip("diffusers")
    record = json.loads(command("models", "--json").stdout)
    wan = next(one for one in record["models"] if one["model"] == "WanTransformer3DModel")
    assert wan["installed"]
    assert wan["family"].startswith("Wan")


WITHOUT_DIFFUSERS = """
import importlib.metadata, sys
from rainfusion.cli import main

def version(name, plain=importlib.metadata.version, found={found!r}):
    if name != "diffusers":
        return plain(name)
    if found is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return found

importlib.metadata.version = version
sys.argv = ["rainfusion", "models"]
main()
"""
WITHOUT_TORCH = """
import sys
from rainfusion.cli import main

sys.modules["torch"] = None
sys.argv = ["rainfusion", "models"]
main()
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (WITHOUT_DIFFUSERS.format(found=None), "diffusers is not installed; pip install 'rainfusion[diffusers]'"),
        (WITHOUT_DIFFUSERS.format(found="0.35.2"), "diffusers 0.35.2 has no registry of attention backends"),
        (WITHOUT_TORCH, "torch is not installed; pip install 'rainfusion[diffusers]'"),
    ],
)
def test_models_without_what_it_needs(code, said):
    pytest.importorskip("diffusers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1


# -- plan ------------------------------------------------------------------------------------------


def test_plan_shows_the_program_and_the_figures():
    shown = command("plan", "--grid", "21x45x80").stdout
    problem = rainfusion.AttentionProblem(1, 40, 75600, 75600, 128, "bfloat16")
    assert str(rainfusion.plan(problem, rainfusion.TokenLayout((21, 45, 80)))) in shown
    assert "29 rows, 29 columns (first frame)" in shown
    assert "64 or 65 of 562 unprotected key blocks, in each of the other 562 rows" in shown
    assert "protection takes 47.87% of all that is kept" in shown
    assert "the same number would skip 71.28% to 75.95%" in shown


def test_plan_as_json_is_a_plan_again(tmp_path):
    answer = command(
        "plan", "--grid", "5x8x8", "--text", 9, "--text-position", "start", "--heads", 2, "--head-dim", 32,
        "--dtype", "float32", "--block", "64x32", "--window", "1x8x8", "--sink", "none", "--omitted", "summary",
        "--sparsity", "0.5", "--counting", "paper", "--png", tmp_path / "plan.png", "--json",
    )  # fmt: skip
    record = json.loads(answer.stdout)
    plan = rainfusion.Plan.from_json(json.dumps(record["plan"]))
    assert plan.layout == rainfusion.TokenLayout((5, 8, 8), 9, "start", (1, 8, 8), (64, 32), None)
    assert record["density"] is None
    low, high = record["density_bounds"]
    assert 0 < low < high < 1
    assert record["other_counting"]["counting"] == "realised"
    assert record["other_counting"]["sparsity_bounds"][0] == pytest.approx(0.5, abs=0.02)
    assert record["notes"] == []
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_plan_by_mass_is_decided_by_the_data():
    answer = command("plan", "--grid", "5x8x8", "--top-p", "0.9", "--floor", "0.1")
    assert "topp(mass=0.9, floor=0.1)" in answer.stdout
    assert "decided by the data" in answer.stdout
    assert json.loads(command("plan", "--grid", "5x8x8", "--top-p", "0.9", "--json").stdout)["density"] is None


def test_plan_of_parts(tmp_path):
    record = json.loads(
        command(
            "plan", "--parts", "text:37,grid:1x13x15,grid:5x8x8:first_frame_keys+last_frame,tokens:20,grid:2x4x4",
            "--sink", "none", "--block", 16, "--heads", 2, "--sparsity", "0.3,0.5", "--png", tmp_path / "plan.png",
            "--json",
        ).stdout
    )  # fmt: skip
    parts = (Text(37), Grid(1, 13, 15), Grid(5, 8, 8, sink=("first_frame_keys", "last_frame")), Tokens(20))
    layout = rainfusion.TokenLayout(parts=(*parts, Grid(2, 4, 4, sink=None)), block=16)
    assert rainfusion.Plan.from_json(json.dumps(record["plan"])).layout == layout
    assert record["policy"] == "topk(sparsity=0.3..0.5 a head)"
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("sink", "shown"),
    [
        ("first_frame", "4 rows, 4 columns (first frame)"),
        ("first_frame_keys", "0 rows, 4 columns (first frame as keys)"),
        ("last_frame", "4 rows, 4 columns (last frame)"),
        ("last_frame_keys+first_frame", "4 rows, 8 columns (last frame as keys, first frame)"),
        ("none", "0 rows, 0 columns (nothing)"),
    ],
)
def test_plan_with_every_sink(sink, shown):
    assert shown in command("plan", "--grid", "9x8x8", "--block", 16, "--sparsity", 0.1, "--sink", sink).stdout


def test_plan_with_both_budgets_is_hybrid_and_with_lengths_reads_them():
    shown = command("plan", "--grid", "9x8x8", "--block", 16, "--sparsity", 0.7, "--top-p", 0.75, "--kv-lengths").stdout
    assert "hybrid(sparsity=0.7, mass=0.75)" in shown
    assert "given %q %k %v %kv_lengths" in shown
    assert "the fewest key blocks that hold 75% of the mass, at least" in shown


def test_plan_in_8_bits():
    shown = command("plan", "--grid", "9x8x8", "--block", 16, "--precision", "int8", "--rotate").stdout
    assert "%k8              = quantise     %k %order  int8 centred rotated block=16" in shown
    refused = command("plan", "--grid", "9x8x8", "--block", 16, "--rotate")
    assert refused.exit_code
    assert "rotate=True has no effect without a precision" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "5x8"], "write it like 21x45x80"),
        (["--grid", "5x8xw"], "write it like 21x45x80"),
        (["--grid", "5x8x8", "--block", "1x2x3"], "write it like 128 or 128x64"),
        (["--grid", f"{'9' * 5000}x1x1"], "write it like 21x45x80"),
        (["--grid", "5x8x8", "--floor", "0.1"], "goes with --top-p alone"),
        (["--grid", "5x8x8", "--floor", "0.1", "--top-p", "0.9", "--sparsity", "0.5"], "goes with --top-p alone"),
        (["--grid", "5x8x8", "--top-p", "0.9", "--counting", "paper"], "excludes --top-p"),
        (["--grid", "5x8x8", "--sparsity", "much"], "is not a number; write 0.8"),
        (["--grid", "5x8x8", "--sink", "middle"], "'middle' is not known; give first_frame, "),
        (["--grid", "5x8x8", "--parts", "text:3"], "--grid / --parts: give one of them"),
        ([], "--grid / --parts: give one of them"),
        (["--parts", "text:3,image:5x5"], "'image:5x5' is not a part; write them like text:37,"),
        (["--parts", "text:3:first_frame"], "'text:3:first_frame' is not a part"),
        (["--parts", "grid:5x5"], "write it like 21x45x80"),
        (["--parts", "grid:5x5x5:middle"], "'middle' is not known"),
        (["--parts", "grid:5x5x5", "--text", "4"], "excludes --parts; write text:COUNT where the text stands"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_options_that_are_not_understood_are_one_line(capfd, monkeypatch, arguments, said):
    code, out, err = main(capfd, monkeypatch, "plan", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert len(err) < 400


def test_without_a_command_the_help_is_shown(capfd, monkeypatch):
    code, out, err = main(capfd, monkeypatch)
    assert code == 2
    assert "Usage" in out + err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--grid", "80000000x1x1", "--block", "1"],
        ["plan", "--parts", "text:2000000000,grid:1x8x8", "--block", "1"],
        ["plan", "--grid", "1x46340x46340", "--block", "1048576", "--png", "huge.png"],
        ["run", "--grid", "1x20000x20000", "--block", "65536"],
        ["run", "--heads", "2000000000"],
    ],
    ids=" ".join,
)
def test_sizes_that_no_machine_can_hold_are_refused_before_memory_is_touched(tmp_path, arguments):
    import resource

    done = subprocess.run(
        [sys.executable, "-m", "rainfusion.cli", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4_000_000_000, 4_000_000_000)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparsity", "1"], "sparsity=1.0 is out of range"),
        (["--sparsity", "0.1,0.2"], "sparsity has 2 shares for 40 heads"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--window", "3x3x3"], "do not fill whole blocks"),
        (["--omitted", "keep"], "omitted='keep' is not known"),
        (["--text", "-1"], "text=-1 is not allowed"),
    ],
)
def test_what_rainfusion_refuses_is_one_line(capfd, monkeypatch, arguments, said):
    code, out, err = main(capfd, monkeypatch, "plan", "--grid", "5x8x8", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_what_a_budget_cannot_reach_is_a_note(capfd, monkeypatch):
    code, out, err = main(capfd, monkeypatch, "plan", "--grid", "2x64x64", "--sparsity", "0.9")
    assert (code, err) == (0, "")
    assert "plan v2" in out
    assert "note       sparsity=0.9 cannot be reached" in out
    (note,) = json.loads(command("plan", "--grid", "2x64x64", "--sparsity", "0.9", "--json").stdout)["notes"]
    assert note.startswith("sparsity=0.9 cannot be reached")


def test_a_budget_that_protection_takes_is_a_note():
    shown = command("plan", "--grid", "21x45x80", "--sparsity", "0.9").stdout
    assert "2 or 3 of 562 unprotected key blocks" in shown
    assert "protection takes 95.73% of all that is kept" in shown
    assert "note       protection (first frame) takes 96% of what is kept" in shown


# -- run -------------------------------------------------------------------------------------------


def test_run_on_a_real_clip(tmp_path):
    answer = command("run", "bikes", *SMALL, "--png", tmp_path / "demo.png")
    assert answer.exit_code == 0, answer.output
    for words in ("highest preference", "none (dense)", "dropped", "summarised", "this plan", "raster order"):
        assert words in answer.stdout
    assert (tmp_path / "demo.png").stat().st_size > 50_000


def test_run_as_json_on_a_named_backend():
    answer = command("run", "carphone", *SMALL, "--backend", "reference", "--json")
    record = json.loads(answer.stdout)
    assert record["backend"] == "reference"
    assert record["why"] == "reference on cpu: asked for by backend='reference'"
    assert record["sparsity"] == pytest.approx(0.5, abs=0.001)
    assert record["recall"]["raster"] < record["recall"]["oracle"]
    assert set(record["omitted"]) == {"drop", "summary"}


def test_run_warns_of_a_budget_in_one_line(capfd, monkeypatch):
    sizes = ["--grid", "2x16x16", "--block", "16", "--heads", "1", "--rounds", "1", "--backend", "reference"]
    code, _, err = main(capfd, monkeypatch, "run", "bikes", *sizes, "--sparsity", "0.9")
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert [note[:40] for note in notes] == ["note: sparsity=0.9 cannot be reached on "]


def test_run_takes_the_options_that_plan_takes():
    shown = command(
        "run", "carphone", *SMALL[:-4], "--rounds", 1, "--backend", "reference", "--sink", "first_frame_keys",
        "--sparsity", "0.4,0.6", "--text", 9, "--text-position", "start", "--json",
    )  # fmt: skip
    record = json.loads(shown.stdout)
    assert record["policy"] == "topk(sparsity=0.4..0.6 a head)"
    assert record["layout"]["parts"][0] == {"text": 9}
    assert record["layout"]["parts"][1]["sink"] == ["first_frame_keys"]
    assert record["sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.mp4"], "is no file; give the path of a video"),
        ([__file__], "cannot be decoded as a video"),
        (["carphone", "--start", "110"], "the grid takes 21"),
        (["--backend", "none"], "backend 'none' is not known"),
        (["--head-dim", "7", "--grid", "2x2x2"], "head_dim=7 is odd"),
        (["--omitted", "keep"], "omitted='keep' is not known"),
        (["--device", "abacus:0", *SMALL], "has no device abacus:0"),
    ],
)
def test_run_refuses_in_one_line(capfd, monkeypatch, arguments, said):
    code, out, err = main(capfd, monkeypatch, "run", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("missing", ["av", "matplotlib"])
def test_run_without_the_demo_extra(capfd, monkeypatch, missing):
    from importlib.util import find_spec

    for module in ("rainfusion.demo.decode", "rainfusion.demo.style"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == missing else find_spec(name))
    code, out, err = main(capfd, monkeypatch, "run", "--png", "demo.png")
    assert (code, out) == (2, "")
    assert "pip install 'rainfusion[demo]'" in err


# -- parity ----------------------------------------------------------------------------------------


def test_parity_of_a_backend_with_itself(tmp_path):
    report = tmp_path / "new" / "parity.json"
    answer = command("parity", "--backend", "reference", "--cases", "ragged_row-*", "--seed", 3, "--report", report)
    assert answer.exit_code == 0, answer.output
    assert "8 agree, 0 disagree, 0 refused" in answer.stdout
    assert "no two are compared" in answer.stderr
    seen = [test["observation"] for test in json.loads(report.read_text())["tests"]]
    assert {observation["seed"] for observation in seen} == {3}
    assert all(len(observation["inputs"]) == 64 for observation in seen)


def test_run_in_8_bits_says_that_it_is_emulated():
    options = ["--rounds", 1, "--backend", "reference", "--precision", "fp8"]
    shown = command("run", "carphone", *SMALL[:-2], *options)
    assert "sparse attention in 8 bits (fp8), by its definition" in shown.stdout
    record = json.loads(command("run", "carphone", *SMALL[:-2], *options, "--rotate", "--json").stdout)
    assert (record["precision"], record["rotate"]) == ("fp8", True)


def test_parity_in_8_bits():
    pytest.importorskip("torch")
    options = ["--backend", "torch", "--cases", "*ragged_row-f32", "--precision", "int8", "--json"]
    answer = command("parity", *options)
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert {x["case"] for x in found["cases"]} == {"int8_ragged_row-f32"}


def test_parity_as_json():
    pytest.importorskip("torch")
    answer = command("parity", "--backend", "torch", "--cases", "ragged_row-f32", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["agree"] is True
    assert [(x["case"], x["level"], x["ok"]) for x in found["cases"]] == [
        ("ragged_row-f32", "attend", True),
        ("ragged_row-f32", "attention", True),
    ]


def observed_as(monkeypatch, **changes):
    """What `observe` gives, with something changed."""
    from rainfusion.testing import observe

    right = observe.observe
    monkeypatch.setattr(observe, "observe", lambda *asked: replace(right(*asked), **changes))


def test_parity_ends_with_1_where_they_disagree(monkeypatch):
    observed_as(monkeypatch, error=float("inf"))
    answer = command("parity", "--backend", "reference", "--cases", "ragged_row-f32")
    assert answer.exit_code == 1
    assert "DISAGREE" in answer.stdout
    assert "ragged_row-f32: attend: the first: the output is off by inf" in answer.stdout
    strict = json.loads(
        command("parity", "--backend", "reference", "--cases", "ragged_row-f32", "--json").stdout,
        parse_constant=pytest.fail,
    )
    assert strict["cases"][0]["bound"] == "inf"


def test_parity_that_compared_nothing_is_not_a_pass(monkeypatch):
    observed_as(monkeypatch, refused="acme: no dtype float32")
    answer = command("parity", "--backend", "reference", "--cases", "ragged_row-f32")
    assert answer.exit_code == 1
    assert "nothing was compared" in answer.stdout


def test_parity_refuses_what_it_does_not_know(capfd, monkeypatch):
    assert "no case is named like" in command("parity", "--backend", "reference", "--cases", "x*").stderr
    code, _, err = main(capfd, monkeypatch, "parity", "--backend", "none")
    assert code == 2
    assert "backend 'none' is not known" in err


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Parity reports of the reference with itself: two seeds, and one whose error is too large."""
    folder = tmp_path_factory.mktemp("reports")
    for name, seed in (("mine", 0), ("other_seed", 3)):
        path = folder / f"{name}.json"
        command("parity", "--backend", "reference", "--cases", "less_than_a_block-*", "--seed", seed, "--report", path)
    wrong = json.loads((folder / "mine.json").read_text())
    wrong["tests"][0]["observation"]["error"] = "inf"
    (folder / "wrong.json").write_text(json.dumps(wrong))
    return folder


def test_parity_compares_two_reports(reports):
    answer = command("parity", "--compare", reports / "mine.json", reports / "mine.json")
    assert answer.exit_code == 0, answer.output
    assert "8 agree, 0 disagree, 0 refused" in answer.stdout
    assert "no two are compared" in answer.stderr
    few = command("parity", "--compare", reports / "mine.json", reports / "mine.json", "--cases", "*f32", "--json")
    assert [case["case"] for case in json.loads(few.stdout)["cases"]] == ["less_than_a_block-f32"] * 2


def test_parity_of_reports_that_disagree(reports):
    answer = command("parity", "--compare", reports / "mine.json", reports / "wrong.json")
    assert answer.exit_code == 1
    assert "less_than_a_block-f16: attend: the second: the output is off by inf" in answer.stdout


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("other_seed", "the reports were made of other inputs (seeds 0 and 3): 8 of 8 observations differ"),
        ("missing", "missing.json cannot be read"),
    ],
)
def test_parity_refuses_reports_that_cannot_be_compared(capfd, monkeypatch, reports, second, said):
    code, out, err = main(capfd, monkeypatch, "parity", "--compare", reports / "mine.json", reports / f"{second}.json")
    assert (code, out) == (2, "")
    assert said in err


def test_parity_says_which_options_do_not_go_together(reports):
    both = command("parity", "--compare", reports / "mine.json", reports / "mine.json", "--backend", "torch")
    assert both.exit_code == 2
    assert "--compare runs none" in both.stderr
    assert "give two reports to --compare" in command("parity").stderr


def test_no_demo_file_was_left_behind():
    assert not Path("demo.png").exists()


# -- calibrate and budgets -------------------------------------------------------------------------

PIPELINES = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tests.integrations.diffusers.pipelines import Nameless, inputs, wan


class Pipeline(Nameless):
    def __call__(self, prompt, num_inference_steps=1):
        return super().__call__(num_inference_steps, seed=len(prompt))


def pipeline():
    return Pipeline(FlowMatchEulerDiscreteScheduler())


def model():
    made = wan()
    return made, lambda prompt: made(**inputs(seed=len(prompt)))


def wrong():
    raise ValueError("no such checkpoint")


number = 3
"""
ASKED = ["--prompts", "prompts.txt", "--out", "out.json", "--config", "config.json", "--sparsity", "0.5"]
LESS = ["--shares", "0.3,0.5,0.7", "--every", "1", "--probes", "1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with pipelines, prompts and a configuration, where the command runs."""
    pytest.importorskip("diffusers")
    (tmp_path / "own_pipelines.py").write_text(PIPELINES)
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a longer dog \n")
    (tmp_path / "config.json").write_text('{"block": 16, "min_blocks": 0, "sink": null}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_pipelines", raising=False)
    yield tmp_path
    sys.modules.pop("own_pipelines", None)


@pytest.mark.parametrize("factory", ["pipeline", "model"])
@pytest.mark.filterwarnings("ignore:.*the budgets gave:rainfusion.RainfusionWarning")  # of random weights
def test_calibrate_and_budgets(folder, capfd, monkeypatch, factory):
    steps = ["--steps", "2"] if factory == "pipeline" else []
    code, out, _ = main(capfd, monkeypatch, "calibrate", f"own_pipelines:{factory}", *ASKED, *LESS, *steps)
    assert code == 0
    assert "mean share 0.5" in out
    calls = 2 * 3 * (2 if steps else 1)  # prompts, layers, steps
    assert f"{calls} attention calls of WanTransformer3DModel measured on 3x8x8" in out
    code, out, err = main(capfd, monkeypatch, "budgets", "out.json", "--sparsity", "0.6", "--ranks", "2")
    assert (code, err) == (0, "")
    assert "mean share 0.6, 2 ranks" in out
    code, out, _ = main(capfd, monkeypatch, "budgets", "out.json", "--json")
    config = rainfusion.integrations.config.RainFusionConfig.of({"sparsity": json.loads(out)})
    assert config.sparsity.sparsity == 0.5


@pytest.mark.filterwarnings("ignore:.*the budgets gave:rainfusion.RainfusionWarning")
def test_calibrate_as_json(folder, capfd, monkeypatch):
    code, out, err = main(capfd, monkeypatch, "calibrate", "own_pipelines:pipeline", *ASKED, *LESS, "--json")
    record = json.loads(out)
    assert (code, record["file"], record["prompts"]) == (0, "out.json", 2)
    assert "wrote out.json" in err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({0: "own_pipelines"}, "'own_pipelines' is not MODULE:FUNCTION"),
        ({0: "no_such_module:make"}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ({0: "own_pipelines:make"}, "own_pipelines has no function make"),
        ({0: "own_pipelines:number"}, "own_pipelines has no function number"),
        ({0: "own_pipelines:wrong"}, "ValueError: no such checkpoint"),
        ({2: "none.txt"}, "none.txt: No such file"),
        ({2: "empty.txt"}, "empty.txt has no prompt; write one a line"),
        ({2: "/dev/zero"}, "is not a regular file"),
        ({4: "none/out.json"}, "there is no folder none"),
        ({4: "."}, "--out: . is a folder; name a file"),
        ({7: "--shares", 8: "0.5,x"}, "--shares: '0.5,x' is not a number; write 0.8, or several, ascending: 0.7,0.9"),
        (
            {0: "own_pipelines:model", 7: "--steps", 8: "2"},
            "--steps: own_pipelines:model returns a model and a function",
        ),
        ({6: "prompts.txt"}, "a configuration is a JSON object"),
        ({8: "0"}, "sparsity=0 skips nothing"),
    ],
)
def test_what_calibrate_cannot_do_is_one_line(folder, capfd, monkeypatch, changed, said):
    (folder / "empty.txt").write_text("\n")
    arguments = ["own_pipelines:pipeline", *ASKED]
    for place, text in changed.items():
        arguments[place] = text
    code, out, err = main(capfd, monkeypatch, "calibrate", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (folder / "out.json").exists()


def test_budgets_of_what_is_no_calibration(folder, capfd, monkeypatch):
    code, out, err = main(capfd, monkeypatch, "budgets", "config.json")
    assert (code, out) == (2, "")
    assert "config.json' is not a calibration" in err
