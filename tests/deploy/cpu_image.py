"""Run the CPU image's steps and put its server to work; prints one JSON object.

unshare --mount --pid --fork --kill-child --mount-proc python -m tests.deploy.cpu_image SCRATCH
"""

from __future__ import annotations

import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.deploy.image import ROOT, Builder, Container, log, new_folder

START_SECONDS = 400
LAST_TOKENS = 300
MODEL = "/models/SmolLM2-135M-Instruct"
ASK = """
import json, sys, urllib.request
body = {"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": int(sys.argv[1]), "messages": [
    {"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
    "ignore_eos": "to-the-end" in sys.argv}
url = "http://127.0.0.1:8000/v1/chat/completions"
request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""
READ = (
    "import sys, urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000' + sys.argv[1]).read().decode())"
)
REACH = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"  # an address of no network


def command(scratch: Path) -> list[str]:
    """What runs this module where its mounts and processes end with it."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*namespaces, sys.executable, "-m", "tests.deploy.cpu_image", str(scratch)]


def check(scratch: Path) -> dict[str, Any]:
    """Run every step of the image, and its server with the configuration of the compose file."""
    started = time.monotonic()
    image = Builder(ROOT, scratch).build(ROOT / "deploy/docker/Dockerfile.cpu")
    built = time.monotonic()
    models = new_folder(scratch / "models")
    models.chmod(0o777)
    volumes = {"/models": models, "/etc/toptheta/config.yaml": ROOT / "deploy/compose/config-cpu.yaml"}
    container = Container(image, scratch, volumes)
    container.execute(["toptheta", "demo-model", "--out", MODEL])
    output = scratch / "server.log"
    server = container.start([], output)
    container.wait_until_healthy(server, output, START_SECONDS)
    healthy = time.monotonic()
    log(f"built in {built - started:.0f} s, healthy {healthy - built:.0f} s later")
    answer = container.beside(server, ["python", "-c", ASK, "40"])
    owner = Path(f"/proc/{server.pid}").stat()
    report: dict[str, Any] = {
        "user": f"{owner.st_uid}:{owner.st_gid}",
        "answer": answer.stdout or answer.stderr,
        "stats": container.beside(server, ["python", "-c", READ, "/toptheta/stats"]).stdout,
        "metrics": container.beside(server, ["python", "-c", READ, "/metrics"]).stdout,
        "leaves_network": container.beside(server, ["python", "-c", REACH]).stderr,
        "writes_root": container.beside(server, ["python", "-c", "open('/opt/toptheta/new', 'w')"]).stderr,
        "packages": json.loads(container.beside(server, ["pip", "list", "--format", "json"]).stdout),
    }
    with ThreadPoolExecutor() as pool:
        last = pool.submit(container.beside, server, ["python", "-c", ASK, str(LAST_TOKENS), "to-the-end"])
        time.sleep(4)  # it has been accepted, and takes longer than that
        server.send_signal(signal.SIGTERM)
        exit_code = server.wait(120)
    return report | {"last": last.result().stdout, "exit_code": exit_code, "log": output.read_text()}


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1]))))  # noqa: T201
