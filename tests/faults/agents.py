"""Two torchrun agents on this machine, each in a network namespace of its own where that is permitted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.launch import ROOT, TAIL, free_port

ADDRESSES = ("10.213.7.1", "10.213.7.2")
ON_LOOPBACK = ("127.0.0.1", "127.0.0.2")  # a rendezvous numbers nodes by their addresses


class Nodes:
    """Where agents run: `separate` says whether each node has a network of its own. A context manager."""

    def __init__(self) -> None:
        self._names = [f"idft-{os.getpid()}-{node}" for node in range(2)]
        self.separate = False
        self.agents: list[Agent] = []

    def __enter__(self) -> "Nodes":
        self.separate = os.geteuid() == 0 and shutil.which("ip") is not None and self._connect()
        return self

    def _connect(self) -> bool:
        first, second = self._names
        links = [f"v{os.getpid()}-{node}" for node in range(2)]
        commands = [f"netns add {first}", f"netns add {second}"]
        commands += [f"link add {links[0]} netns {first} type veth peer name {links[1]} netns {second}"]
        for name, link, address in zip(self._names, links, ADDRESSES, strict=True):
            commands += [f"-n {name} addr add {address}/24 dev {link}"]
            commands += [f"-n {name} link set {device} up" for device in ("lo", link)]
        for command in commands:
            if subprocess.run(["ip", *command.split()], stderr=subprocess.DEVNULL).returncode:
                self._disconnect()
                return False
        self._links = links
        return True

    def _disconnect(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def rendezvous(self) -> str:
        """A fresh address for a rendezvous on node 0."""
        return f"{ADDRESSES[0] if self.separate else '127.0.0.1'}:{free_port()}"

    def start(
        self,
        node: int,
        rendezvous: str,
        words: Sequence[str],
        output: Path,
        environment: dict,
        join: int = 60,
        python: str = sys.executable,
    ) -> "Agent":
        """`torchrun` for two nodes with one process each; all it prints is appended to `output`.

        join: seconds to wait for the other node. python: runs the agent and its process.
        """
        host = (ADDRESSES if self.separate else ON_LOOPBACK)[node]
        command = ["ip", "netns", "exec", self._names[node]] if self.separate else []
        command += [python, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "faults", "--rdzv-endpoint", rendezvous]
        # In a namespace of its own a node cannot tell by its host name that it is the one that hosts the rendezvous.
        command += ["--rdzv-conf", f"join_timeout={join},is_host={int(node == 0)}"]
        command += ["--local-addr", host, "--monitor-interval", "0.1", *words]
        interface = {"GLOO_SOCKET_IFNAME": self._links[node] if self.separate else "lo"}
        with open(output, "a") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **interface, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        agent = Agent(process, output)
        self.agents.append(agent)
        return agent

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            agent.kill()
        if self.separate:
            self._disconnect()


class Agent:
    """A running `torchrun`."""

    def __init__(self, process: subprocess.Popen, output: Path):
        self.process, self._output = process, output

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    def workers(self) -> list[int]:
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(word) for word in listed.stdout.split()]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Its exit code. AssertionError with the tail of its output if it does not end in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"an agent has not ended within {timeout} s\n{self.text[-TAIL:]}") from None

    def kill(self) -> None:
        """The agent and, by that, its workers."""
        for pid in [*self.workers(), self.process.pid] if self.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait_for(condition: Callable[[], object], what: str, agents: Sequence[Agent], timeout: float = 180) -> None:
    """Wait until `condition`; AssertionError if it does not come, or an agent ends before it does."""
    deadline = time.monotonic() + timeout
    while not condition():
        ended = [agent for agent in agents if agent.process.poll() is not None]
        if ended or time.monotonic() > deadline:
            tails = "\n----\n".join(agent.text[-TAIL:] for agent in agents)
            raise AssertionError(f"{what} has not come, {'an agent ended' if ended else f'{timeout} s'}\n{tails}")
        time.sleep(0.05)
