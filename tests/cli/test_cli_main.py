"""The entry point: exit codes, one-line mistakes, a light start."""

import subprocess
import sys

import pytest

from lightning_lossplug.cli import list as list_command
from lightning_lossplug.cli.main import COMMANDS, main
from lightning_lossplug.errors import LossplugError


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from lightning_lossplug.cli.main import main; code = main(['--help']); "
        "heavy = {'torch', 'lightning', 'rich', 'timm', 'numpy'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_no_arguments_print_the_help(cli):
    assert cli().out == cli("-h").out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(cli, name):
    done = cli(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"lossplug {name}" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lst"], "unknown command 'lst'. Did you mean 'list'?"),
        (["--verson"], "unknown option '--verson'. Did you mean '--version'?"),
        (["list", "--jsn"], "Did you mean '--json'?"),
        (["show"], "the following arguments are required: name"),
        (["show", "focal", "poly_loss"], "unexpected argument 'poly_loss'"),
        (["demo", "--epochs", "0"], "'0' is no whole number above 0"),
        (["evaluate"], "the following arguments are required: paths"),
        (["export", "x.ckpt"], "the following arguments are required: --output"),
    ],
)
def test_wrong_arguments_are_one_line(mistake, arguments, words):
    assert words in mistake(*arguments)


def test_debug_shows_the_traceback(cli):
    with pytest.raises(LossplugError, match="no kind or family 'nothing'"):
        main(["list", "nothing", "--debug"])


def test_debug_by_environment(cli, monkeypatch):
    monkeypatch.setenv("LOSSPLUG_DEBUG", "1")
    with pytest.raises(LossplugError):
        main(["nothing"])


def test_an_interrupt_is_130(cli, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(list_command, "run", interrupted)
    assert cli("list") == (130, "", "lossplug: interrupted\n")


def test_a_closed_pipe_is_no_mistake():
    code = "from lightning_lossplug.cli.main import main; import sys; sys.exit(main(['list', 'losses']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 0, err
    assert b"Traceback" not in err
