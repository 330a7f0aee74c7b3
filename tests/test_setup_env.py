"""tools/setup_env.py, as far as that goes without installing anything."""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def environment(setup_env, tmp_path):
    return setup_env.Environment(tmp_path / "venv")


@pytest.fixture
def installations(setup_env, monkeypatch):
    """What is made and installed is noted, not done."""
    done = []

    def make_venv(environment):
        environment.python.parent.mkdir(parents=True)
        environment.python.symlink_to(sys.executable)
        done.append("make")

    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    monkeypatch.setattr(setup_env, "install", lambda environment: done.append("install"))
    monkeypatch.setattr(setup_env, "check_python", lambda: None)
    return done


def test_done_once(setup_env, environment, installations):
    for _ in range(2):
        setup_env.set_up(environment, keep_python=False)
    assert installations == ["make", "install"]


def test_changed_requirements_are_installed(setup_env, environment, installations, monkeypatch):
    setup_env.set_up(environment, keep_python=False)
    monkeypatch.setattr(setup_env, "sources_digest", lambda: "changed")
    setup_env.set_up(environment, keep_python=False)
    assert installations == ["make", "install", "install"]


def test_interrupted_installation_is_repeated(setup_env, environment, installations, monkeypatch):
    def interrupt(environment):
        raise KeyboardInterrupt

    install = setup_env.install
    monkeypatch.setattr(setup_env, "install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setup_env.set_up(environment, keep_python=False)
    (environment.path / "half an installation").touch()
    monkeypatch.setattr(setup_env, "install", install)
    setup_env.set_up(environment, keep_python=False)
    assert installations == ["make", "make", "install"]
    assert not (environment.path / "half an installation").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_another_python(setup_env, environment, installations, monkeypatch, keep):
    setup_env.set_up(environment, keep_python=keep)
    monkeypatch.setattr(sys, "prefix", "/another/python")
    setup_env.set_up(environment, keep_python=keep)
    assert installations == ["make", "install"] * (1 if keep else 2)


def test_removed_python(setup_env, environment, installations):
    setup_env.set_up(environment, keep_python=True)
    environment.python.unlink()
    environment.python.symlink_to("/no/such/python")
    setup_env.set_up(environment, keep_python=True)
    assert installations == ["make", "install"] * 2


def test_interrupted_installation_goes_on_with_its_python(
    setup_env, environment, installations, monkeypatch
):
    setup_env.set_up(environment, keep_python=True)
    environment.set_state(environment.state()._replace(sources=None))
    theirs = sys.executable
    started = []

    def execv(path, arguments):
        started.append((path, arguments))
        raise SystemExit

    monkeypatch.setattr(setup_env.os, "execv", execv)
    monkeypatch.setattr(sys, "executable", "/another/python")
    with pytest.raises(SystemExit):
        setup_env.set_up(environment, keep_python=True)
    assert started == [(theirs, [theirs, *sys.argv])]
    assert installations == ["make", "install"]


def test_environment_of_somebody_else_is_not_touched(setup_env, environment, installations):
    environment.path.mkdir()
    (environment.path / "pyvenv.cfg").write_text("theirs")
    with pytest.raises(setup_env.SetupError, match="was not made by this script"):
        setup_env.set_up(environment, keep_python=False)
    assert installations == []
    assert [path.name for path in environment.path.iterdir()] == ["pyvenv.cfg"]


def test_failed_command_is_an_error_with_its_output(setup_env, environment, capfd):
    environment.path.mkdir()
    with pytest.raises(setup_env.SetupError, match="trying"):
        environment.run("trying", [sys.executable, "-c", "print('reason'); raise SystemExit(3)"])
    assert "reason" in capfd.readouterr().err


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 9, 18), (3, 13, 0)])
def test_untested_python_is_named(setup_env, monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(setup_env.SetupError, match=re.escape(sys.executable)):
        setup_env.check_python()


def test_merge_constraints_holds_what_is_there(setup_env):
    tested = "# comment\nPillow==2\nsetuptools==80\ntorch==2.11.0\ntyping_extensions==4\n"
    held = "torch==2.1.0+cu118\ntyping.Extensions==3\nsetuptools==82\nother==1\n"
    assert setup_env.merge_constraints(tested, held).splitlines() == [
        "pillow==2",
        "setuptools==80",
        "torch==2.1.0+cu118",
        "typing-extensions==3",
    ]


def test_tested_set_has_everything_that_is_asked_for(setup_env):
    pins = dict(setup_env.parse_pins(setup_env.CONSTRAINTS.read_text()))
    asked = [line for line in setup_env.DETECTRON2_NEEDS.read_text().splitlines() if line[0] != "#"]
    try:
        project = metadata.requires("wsbcn_d2")
    except metadata.PackageNotFoundError:
        pytest.skip("the project is not installed")
    # setuptools writes either kind of quotes
    asked += [r for r in project if not re.search("extra == ['\"](dev|test-libraries)['\"]", r)]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in asked}
    assert {"torch", "pytest", "scikit-learn"} <= names  # it was read as it is meant
    assert names <= pins.keys()
