"""Runs functions of a test file in two processes that form a gloo process group.

    python two_ranks.py FILE

starts two processes with Detectron2's own ``launch``. Both call every function of FILE whose name
starts with ``ranks_``, with the rank, in the order of the file. The first failure ends both.
"""

import importlib.util
import os
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_two_ranks(file, tmp_path, **environment):
    """The seconds each function took; fails the calling test with the output if one failed."""
    env = {**os.environ, **environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, __file__, file], env=env, cwd=tmp_path, text=True, capture_output=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    print(result.stdout)
    return result.stdout


def main(file):
    import time

    import torch
    from detectron2.utils import comm

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("two_ranks_functions", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, function in list(vars(module).items()):
        if name.startswith("ranks_"):
            torch.manual_seed(0)
            start = time.perf_counter()
            try:
                function(comm.get_rank())
            except BaseException:
                print(f"{name} failed on rank {comm.get_rank()}\n{traceback.format_exc()}")
                sys.stdout.flush()
                os._exit(1)  # the other rank may wait for this one in a collective
            comm.synchronize()
            if comm.is_main_process():
                print(f"{name}: passed in {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    from detectron2.engine import launch

    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
