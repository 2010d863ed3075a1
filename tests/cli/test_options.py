"""Parsing of the command line: options become arguments, mistakes become one-line errors."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import arg

from maskwright import cli
from maskwright._version import __version__
from maskwright.cli.arguments import key_values, value_of
from maskwright.errors import UsageError
from maskwright.terminal import choose, parse

pytestmark = pytest.mark.fast


def verb(
    name: Annotated[str, arg(metavar="NAME")],
    /,
    *,
    out: Path = Path("there"),
    threshold: float = 0.5,
    format: tuple[Literal["drawn", "coco"], ...] = ("drawn",),
) -> int:
    """Do a thing.

    Examples:
      maskwright thing a --threshold 0.7

    Args:
        name: Whose.
        out: Where to.
        threshold: From where on.
        format: As what.
    """
    said.append((name, out, threshold, format))
    return 7


said: list = []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a"], ("a", Path("there"), 0.5, ("drawn",))),
        (["a", "--out", "x/y", "--threshold", "0.25"], ("a", Path("x/y"), 0.25, ("drawn",))),
        (["--format", "coco", "drawn", "--threshold=1", "a"], ("a", Path("there"), 1.0, ("coco", "drawn"))),
    ],
)
def test_options_become_arguments(arguments, expected):
    said.clear()
    action = parse(verb, arguments, "maskwright thing")
    assert said == [], "parsing alone calls nothing"
    assert action() == 7
    assert said == [expected]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--treshold", "1"], ["no option --treshold", "did you mean --threshold?"]),
        (["--name", "a"], ["thing has no option --name; give the value without it: maskwright thing NAME"]),
        (["a", "--xyzzy"], ["no option --xyzzy", "see maskwright thing --help"]),
        (["a", "-q"], ["no option -q"]),
        (["--treshold", "1"], ["did you mean --threshold?"]),
        (["a", "b"], ["unexpected argument 'b'"]),
        ([], ["thing also needs NAME"]),
        (["a", "--thresh", "1"], ["thing has no option --thresh; did you mean --threshold?"]),
        (["a", "--out"], ["--out needs a value"]),
        (["a", "--threshold", "high"], ["--threshold must be a number, got 'high'; see maskwright thing --help"]),
        (["a", "--format", "coko"], ["'coko'", "--format", "drawn", "coco"]),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words):
    with pytest.raises(UsageError) as caught:
        parse(verb, arguments, "maskwright thing")
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not set(sentence) & set("╭│╰─"), "no frame around it"
    for word in words:
        assert word in sentence


def test_errors_are_readable_without_unicode(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UsageError, match=r"invalid choice 'coko' for argument '--format'"):
        parse(verb, ["a", "--format", "coko"], "maskwright thing")
    with pytest.raises(UsageError, match="also needs NAME"):
        parse(verb, [], "maskwright thing")


def test_the_nearest_name_is_offered():
    assert choose("train", ["train", "check"], "command") == "train"
    with pytest.raises(UsageError, match=r"unknown command 'trian'; did you mean 'train'\?"):
        choose("trian", ["train", "check"], "command")
    with pytest.raises(UsageError, match="expected one of train, check"):
        choose("xyz", ["train", "check"], "command")


def test_key_values_are_json_or_text():
    assert key_values(["depth=18", "sizes=[1, 2]", "kind=softmax", "on=true", "path=a=b"]) == {
        "depth": 18,
        "sizes": [1, 2],
        "kind": "softmax",
        "on": True,
        "path": "a=b",
    }
    with pytest.raises(UsageError, match="'depth' is not KEY=VALUE"):
        key_values(["depth"])


def test_an_option_can_be_read_before_the_rest():
    assert value_of(["m", "--out", "x", "--recipe=small"], "--recipe") == "small"
    assert value_of(["m", "-o", "x"], "--out", "-o") == "x"
    assert value_of(["m", "--out"], "--out") is None
    assert value_of(["m"], "--out") is None


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_the_help_of_every_command_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as leave:
        cli.main([name, "--help"])
    assert leave.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: maskwright {name}" in shown
    assert "Examples:" in shown
    assert f"\n  maskwright {name}" in shown


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_help_keeps_the_lines_of_lists_and_omits_empty_defaults(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out.splitlines()
    about = (inspect.getdoc(cli.VERBS[name]) or "").partition("\nArgs:")[0].splitlines()
    lists = [line for line in about if line.startswith("  ") or "  " in line]
    assert lists
    assert set(lists) <= set(shown)
    if name != "train":  # the defaults of a recipe are shown, also empty ones
        assert not {"(default: )", "(default: None)"} & set(re.findall(r"\(default: .*?\)", " ".join(shown)))
    prose = [line for line in shown if line not in lists]
    assert max(map(len, prose)) <= 100


def test_the_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for name in cli.VERBS:
        assert f"\n  {name} " in shown
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == shown


def test_a_system_without_weights_in_the_catalogue_is_named(capsys):
    assert cli.main(["checkpoints", "--system", "blendmask"]) == 0
    assert capsys.readouterr().out.startswith("the catalogue has no weights of blendmask; ")


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskwright {__version__}\n"


@pytest.mark.thorough
def test_every_choice_of_the_recipe_is_an_option_of_train(capsys):
    from dataclasses import fields

    from maskwright.training.recipe import RECIPES, Recipe

    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", "detectron2-1x", "--help"])
    shown = capsys.readouterr().out
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert f"(default: {RECIPES['detectron2-1x'].steps})" in shown, "the named recipe's values are the defaults"


def test_train_passes_only_changed_values(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("maskwright.training.train", lambda *a, **k: calls.append((a, k)) or tmp_path / "best")
    line = ["train", "mask-rcnn", "--data", "d", "-o", str(tmp_path), "--epochs", "3"]
    assert cli.main([*line, "--option", "depth=18", "--augment", "flip=0"]) == 0
    ((arguments, options),) = calls
    assert arguments == ("mask-rcnn", "d")
    assert options["out"] == tmp_path
    assert options["options"] == {"depth": 18}
    assert options["epochs"] == 3
    assert options["augment"]["flip"] == 0
    assert not options["resume"]
    assert "lr" not in options
    assert "maskwright predict IMAGES --weights" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_own_recipe(monkeypatch, tmp_path):
    from maskwright.training.recipe import Recipe

    calls = []
    monkeypatch.setattr("maskwright.training.train", lambda *a, **k: calls.append(k) or tmp_path / "best")
    (tmp_path / "recipe.json").write_text(Recipe(epochs=9, lr=0.5, augment={"flip": 0.25}).to_json())
    assert cli.main(["train", "mask-rcnn", "--data", "d", "-o", str(tmp_path), "--resume", "--epochs", "12"]) == 0
    assert calls[0]["resume"]
    changed = {k: v for k, v in calls[0].items() if k in vars(Recipe())}
    assert changed == {"epochs": 12}


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom maskwright.cli import main\nmain(['--help'])\n"
        "try: main(['predict', '--help'])\nexcept SystemExit: pass\n"
        "assert main(['predict', 'x.jpg', '--scroe-threshold', '1']) == 2\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "did you mean --score-threshold?" in done.stderr
