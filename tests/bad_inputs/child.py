"""Run the command line in forks of a process that has imported it: a crash, a hang or a flood ends the fork alone.

Reads lines of json, [folder, commands], from the standard input; answers each with a list of [exit code, output], which
ends with the first command that ended the fork.
"""

import contextlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback

SECONDS = 20
GIGABYTES = 3  # beyond what the imports have mapped
TRACEBACK = 99
MARK = "exit code: "


def mapped() -> int:
    """Bytes of address space in use; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def run(folder: str, commands: list[list[str]], output: int) -> None:
    """Run commands one after the other, each with the time limit, and write a line MARK and the code after each."""
    from dimaskdino import cli

    if size := mapped():
        resource.setrlimit(resource.RLIMIT_AS, (size + (GIGABYTES << 30),) * 2)
    os.chdir(folder)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin.close()
    for arguments in commands:
        signal.alarm(SECONDS)  # its default action ends a process that never returns to Python, too
        sys.argv = ["dimaskdino", *arguments]
        code: object = TRACEBACK
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc(limit=-4)
        with contextlib.suppress(BaseException):
            print(f"\n{MARK}{code or 0}")
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(0)


def answer(code: int, output: str) -> str:
    """What the command line said when it refused, in lines; nothing for a success, and anything else fails."""
    assert code in (0, 1), f"exit code {code}\n{output[-3000:]}"
    assert "Traceback" not in output, output[-3000:]
    said = output.strip().splitlines()
    assert code == 0 or (said and len(said[-1]) < 1500), output[-3000:]
    return output if code else ""


def serve() -> None:
    # what the commands import when they run
    import dimaskdino.checkpoints.published_settings
    import dimaskdino.data.check
    import dimaskdino.data.importing
    import dimaskdino.training.trainer  # noqa: F401

    for line in sys.stdin:
        if not line.strip():
            break
        with tempfile.TemporaryFile() as captured:
            child = os.fork()
            if not child:
                run(*json.loads(line), captured.fileno())
            _, status = os.waitpid(child, 0)
            captured.seek(0)
            *done, rest = re.split(rf"\n{MARK}(\d+)\n", captured.read().decode(errors="replace"))
        results = [(int(code), text) for text, code in zip(done[::2], done[1::2], strict=True)]
        if status:  # the command that ended the fork
            results.append((os.waitstatus_to_exitcode(status), rest))
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    serve()
