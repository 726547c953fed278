"""The suite's core with the oldest and the newest versions of what the library needs.

    pip install "stompp-hf[dev]"
    nox -f tests/noxfile.py                 # both; one of them: -s lowest, -s newest

Both install this checkout in environments of their own. The oldest are those of setup.cfg, in their last patch.
"""

import configparser
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
CORE = (
    *("callback", "mixing", "packed_checkpoints", "packed_layers", "peft", "peft_refusals", "progression"),
    *("resuming", "save_reload", "saving", "surgery"),
)
"""Files of tests that meet torch, transformers, accelerate and PEFT where their versions differ."""
nox.options.default_venv_backend = "venv"


def bounds() -> list[str]:
    """What is required, and PEFT, as setup.cfg has it: "torch >= 2.9"."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required, peft = config["options"]["install_requires"], config["options.extras_require"]["peft"]
    return (required + peft).split("\n")[1:]


def core(session: nox.Session, *versions: str) -> None:
    """Install, and test."""
    session.chdir(ROOT)
    session.install("-e", ".[examples,peft,rich]", "hypothesis", "pytest", *versions)
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    files = [f"tests/test_{name}.py" for name in CORE]
    session.run("python", "-m", "pytest", "-q", *files, *session.posargs, env=offline)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The lower bounds."""
    core(session, *(bound.replace(" >= ", "==") + ".*" for bound in bounds()))


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """What there is today."""
    core(session, "--upgrade", "--upgrade-strategy=eager")
