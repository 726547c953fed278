"""The accelerate configurations: all of them are read, and the one for CPUs is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parent.parent / "examples" / "accelerate_configs"
SCRIPT = """
import os
import torch
from accelerate import Accelerator
from stompp_hf import Progression, StoMPPConfig, binarize_model

accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
binarize_model(model, StoMPPConfig(first_layer="binarize", head="binarize", refresh_rate=1), torch.zeros(1, 16))
progression = Progression(model, 8)
progression.step(2)
mask = next(m.weight_mask for m in progression.layers.values() if m.weight_mask is not None)
masks = accelerator.gather(mask[None])
assert torch.equal(masks[0], masks[-1])
accelerator.print("processes", accelerator.num_processes, accelerator.device.type, len(masks), flush=True)
os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts
"""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.num_processes % config.num_machines == 0 and not config.use_cpu
    assert path.name in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_fsdp_is_the_second_version():
    options = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    named = {key.removeprefix("fsdp_"): value for key, value in options.items() if key != "fsdp_version"}
    named["cpu_offload"] = named.pop("offload_params")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=options["fsdp_version"], **named)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True


def test_two_cpu_processes_start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launch, str(FOLDER / "cpu_two_processes.yaml"), "--main_process_port", "0", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes 2 cpu 2" in done.stdout
