"""How fast is the server: throughput and latency by number of clients, refusals under overload, memory over time.

    python benchmarks/serving.py WEIGHTS IMAGE                       # 1, 4 and 16 clients, then overload, then memory
    python benchmarks/serving.py WEIGHTS IMAGE --seconds 5 --requests 5000

The server is a process of its own (`maskwright serve`) on this machine, and the clients are threads of this one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path


def memory_of(process: int) -> float:
    """Resident memory in MB."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[0]) / 1024


def load(port: int, data: bytes, clients: int, seconds: float, requests: int | None = None) -> dict[str, object]:
    """Send requests from several clients, each over one connection, until the time or the number is used up."""
    latencies: list[float] = []
    answers: Counter[int] = Counter()
    left = [requests if requests is not None else 1 << 60]
    guard, until = threading.Lock(), time.perf_counter() + seconds

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() < until:
            with guard:
                if left[0] <= 0:
                    return
                left[0] -= 1
            start = time.perf_counter()
            connection.request("POST", "/predict", data)
            answer = connection.getresponse()
            answer.read()
            with guard:
                answers[answer.status] += 1
                if answer.status == 200:
                    latencies.append(time.perf_counter() - start)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock = time.perf_counter() - start
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else [float("nan")] * 99
    return {
        "clients": clients, "answers": dict(answers), "images per second": round(answers[200] / clock, 2),
        "p50 / ms": round(1000 * cuts[49], 1), "p99 / ms": round(1000 * cuts[98], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=20, help="per number of clients")
    parser.add_argument("--requests", type=int, default=5000, help="of the measurement of memory")
    parser.add_argument("--limit", type=int, default=32, help="requests in progress that the server accepts")
    arguments, further = parser.parse_known_args()
    data = arguments.image.read_bytes()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = ["--port", str(port), "--requests", str(arguments.limit)]
    command = [sys.executable, "-m", "maskwright", "serve", arguments.weights, *limits, *further]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.1)
        load(port, data, 2, 60, 20)
        for clients in arguments.clients:
            print(json.dumps(load(port, data, clients, arguments.seconds)), flush=True)
        print(json.dumps({"overload": load(port, data, 3 * arguments.limit, arguments.seconds)}), flush=True)
        before = memory_of(server.pid)
        row = load(port, data, 4, 1e9, arguments.requests)
        print(json.dumps({"MB before": round(before), "MB after": round(memory_of(server.pid))} | row), flush=True)
        print(json.dumps({"load average": [round(v, 1) for v in os.getloadavg()]}))
    finally:
        server.terminate()
        print(json.dumps({"exit code after SIGTERM": server.wait(60)}))


if __name__ == "__main__":
    main()
