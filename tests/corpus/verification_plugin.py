"""Plug-ins of test_verification.py: well-behaved ones, and every way to misbehave."""

import os
import subprocess
import sys
import time

NOT_A_FUNCTION = 3


def same_length(response, reference):
    return None if reference == "?" else len(response) == len(reference)


def choose(response, reference):
    """Does what the response says."""
    print("noise on stdout", flush=True)
    os.write(1, b'{"verdict": "right"}\n')
    print("noise on stderr", file=sys.stderr, flush=True)
    if response == "sleep":
        time.sleep(1e6)
    if response == "child":  # waits for a program that it started
        command = [
            sys.executable,
            "-c",
            f"import os, time; print(os.getpid(), file=open({reference!r}, 'w'), flush=True)",
        ]
        command[-1] += "\ntime.sleep(1e6)"
        subprocess.run(command, stdin=sys.stdin, check=True)
    if response == "hog":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    if response == "exit":
        os._exit(3)
    if response == "crash":
        os.abort()
    if response == "quit":
        sys.exit("bye")
    if response == "raise":
        raise KeyError("what is wrong")
    if response == "number":
        return 1
    if response == "modules":
        return not {"torch", "numpy", "megatron", "pyarrow"} & set(sys.modules)
    if response == "process":
        return os.getpid() == reference
    return response == reference
