"""Processes under torchrun: what a worker needs so that it ends with its agent, and can be started again."""

from __future__ import annotations

import argparse
import ipaddress
import json
import multiprocessing
import os
import queue
import signal
import socket
import time
from datetime import timedelta
from multiprocessing.managers import SyncManager
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from megatron_idft.integration.platform import upstream
from megatron_idft.integration.platform.signals import STOPS, die_with_parent


def die_with_agent() -> None:
    """Let the kernel kill this process when the torchrun agent that started it dies. Linux only.

    Otherwise it would live on without anyone to restart it, and its peers would wait for it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def use_fresh_store() -> None:
    """Let the ranks meet in a store of this start. Called before torch.distributed is initialised.

    torchrun's agents keep one store for all restarts (seen in torch 2.15, elastic/rendezvous/dynamic_rendezvous.py and
    distributed/rendezvous.py), so a restarted rank may find there the address of a peer that has died, and older
    versions told the starts apart by a number that agents count differently. Here rank 0 serves a store of its own and
    publishes its address in the agents', which need not be on rank 0's node after a restart; the address of a dead
    rank 0 refuses connections, and is read again.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    key, patience = "megatron-idft/store", 300.0
    agents = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=patience))
    if os.environ["RANK"] == "0":
        host = _own_address(host, port)
        server = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        agents.set(key, json.dumps([host, server.port]))
        _kept.append(server)  # torch.distributed will share it, as it is asked for the same port in this process
        port = server.port
    else:
        deadline = time.monotonic() + patience
        while True:
            host, port = json.loads(agents.get(key))
            try:
                TCPStore(host, port, is_master=False, timeout=timedelta(seconds=2))
                break
            except DistError:
                if time.monotonic() > deadline:
                    raise
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _own_address(host: str, port: int) -> str:
    """This machine's address as seen from `host`; `host` itself where that is this machine."""
    with socket.create_connection((host, port), timeout=60) as connection:
        address = connection.getsockname()[0]
    return host if ipaddress.ip_address(address).is_loopback else address


_kept: list[Any] = []


def keep_results_queue(args: argparse.Namespace) -> None:
    """Replace the queue in which Megatron's writer of checkpoints leaves its results.

    Upstream (core/dist_checkpointing/strategies/filesystem_async.py) serves it by a process of its own, which dies of
    the SIGTERM that torchrun sends to the whole process group, and with it the checkpoint that is to be saved then;
    which lives on when the rank is killed; and which costs seconds to start. Only --async-save writes elsewhere.
    """
    target = "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue"
    if not args.async_save:
        upstream.replace(target, queue.Queue())
    elif args.async_strategy == "mcore":
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(_outlive_stops)
        upstream.replace(target, manager.Queue())


def _outlive_stops() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
