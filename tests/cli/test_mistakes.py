"""User mistakes and failures of the environment give a one-line error and exit code 2, without a traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
import warnings

import pytest

from maskwright import cli
from maskwright.errors import AnnotationError
from maskwright.terminal import explain, guarded

pytestmark = pytest.mark.fast


def failing(error: BaseException):
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AnnotationError("a.json: annotation 3 has no bbox; add one"), ["a.json: annotation 3"]),
        (OSError(errno.ENOSPC, "No space left on device", "out/x.png"), ["out/x.png", "no space left", "another disk"]),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), ["/root/x", "permission denied"]),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"),
            ["x.json", "no such file", "spelling"],
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), ["a/b", "not a directory", "another path"]),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), ["no space left"]),
        (MemoryError(), ["out of memory", "--batch"]),
    ],
)
def test_errors_that_a_user_can_fix_are_one_line(error, words, capsys):
    assert guarded(failing(error)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("maskwright: ")
    assert shown.err.count("\n") == 1
    for word in words:
        assert word in shown.err


def test_an_interruption_is_130(capsys):
    assert guarded(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert guarded(failing(KeyboardInterrupt("stopped after step 3; runs/x goes on with resume"))) == 130
    assert capsys.readouterr().err == "stopped after step 3; runs/x goes on with resume\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "64", "64", "--masks", "image"], "--size, --masks requires --form graph"),
        (["--task", "panoptic", "--score-threshold", "0.3"], "--task, --score-threshold requires --form graph"),
        (["--form", "graph", "--calibration", "8"], "--calibration requires --int8"),
        (["--data", "x", "--limit", "3"], "--data, --limit requires --int8"),
        (["--int8"], "--int8 requires --data"),
        (["--int8", "--data", "x", "--detections", "5"], "--detections requires --form graph"),
    ],
)
def test_options_of_export_without_an_effect_are_refused(options, words, capsys):
    assert cli.main(["export", "x.safetensors", "-o", "x.onnx", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_warning_is_one_line(capsys):
    def action() -> int:
        warnings.simplefilter("always")
        warnings.warn("a.json: 2 annotations\nwere left out", UserWarning, stacklevel=1)
        return 0

    assert guarded(action) == 0
    assert capsys.readouterr().err == "note: a.json: 2 annotations were left out\n"


def test_a_bug_of_the_library_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(failing(ZeroDivisionError("x")))
    assert explain(RuntimeError("shapes differ")) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evalute x", ["unknown command 'evalute'", "did you mean 'evaluate'?"]),
        ("--verion", ["unknown option '--verion'; did you mean '--version'?"]),
        ("train mask-rcn --data x", ["no system or preset 'mask-rcn'; did you mean 'mask-rcnn'?"]),
        ("checkpoints xyz", ["names such as", "unknown name of weights 'xyz'"]),
        ("checkpoints mask-rcnn-scene", ["did you mean 'mask-rcnn-scenes'?"]),
        ("--verbose", ["the first argument must be a command"]),
        ("predict a.jpg", ["--weights"]),
        ("checkpoints --system mask-rcn", ["unknown system 'mask-rcn'", "mask-rcnn"]),
        ("train mask-rcnn --data x --recipe tiny", ["no recipe 'tiny'", "detectron2-1x"]),
        ("train mask-rcnn --data x --recipe none.json", ["none.json", "no such file"]),
        ("train mask-rcnn --data x --epochs 0", ["epochs must be at least 1, got 0"]),
        ("predict a.jpg -w no-such-file.pth", ["no-such-file.pth"]),
        ("evaluate no-such-file.pth --data x", ["no-such-file.pth"]),
        ("convert no-such-file.pth -o x.safetensors", ["no-such-file.pth"]),
        ("check no-such-folder", ["no-such-folder"]),
        ("report no-such-run", ["no-such-run"]),
        ("train mask-rcnn --data no-such-folder", ["no-such-folder"]),
        (
            "systems solov9",
            ["there is no system or preset 'solov9'; did you mean 'solov2'? `maskwright systems` lists"],
        ),
    ],
)
def test_a_mistyped_command_gives_a_one_line_error(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert shown.err.startswith("maskwright: ")
    assert len(shown.err) < 600
    for word in words:
        assert word in shown.err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_closed_pipe_is_not_an_error():
    code = "import sys; from maskwright.cli import main; sys.exit(main(['--help']))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    complaint = run.stderr.read()
    assert run.wait(60) == 0
    assert complaint == b""
    run.stderr.close()
