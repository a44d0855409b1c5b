"""A module for the processes of test_processes.py: it does what its tasks say."""

import os
import subprocess
import sys

from megatron_idft.processes import serve


def load(settings):
    if settings == "print and exit":
        print("no such table\n", file=sys.stderr, flush=True)
        os._exit(4)

    def answer(header, payload):
        match header:
            case "measure":
                return len(payload)
            case "noise":
                print("x" * 1_000_000, file=sys.stderr, flush=True)
            case "pid":
                return os.getpid()
            case "exit":
                print("first\nlast words\n", file=sys.stderr, flush=True)
                os._exit(3)
            case "child":
                return subprocess.Popen(["sleep", "1000"]).pid
            case "hang":
                return 9**9**9**9  # C code: no thread of this process runs meanwhile
        return header

    return answer


if __name__ == "__main__":
    serve(load)
