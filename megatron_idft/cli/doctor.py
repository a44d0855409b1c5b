"""`doctor`: what is installed, what each part will use, what is missing and the command that installs it."""

from collections.abc import Sequence

from megatron_idft.parsing import OF_EVERY_VERB

USAGE = f"""usage: megatron-idft doctor

Prints versions, where megatron.core and megatron.training load from, devices, libraries and the backend that each part
will use. Exit code 0 only if training can start.

{OF_EVERY_VERB}"""


def main(argv: Sequence[str]) -> int:
    if argv:
        print(USAGE)
        return 0 if list(argv) in (["-h"], ["--help"]) else 2
    from megatron_idft.integration.platform.doctor import examine, print_report

    return 0 if print_report(examine()) else 1
