"""A worker of pytest-xdist that leaves a server of warm.py before pytest begins.

The imports that both need are made once. pytest-xdist starts it as it starts `python`:

    pytest --dist worksteal --tx "2*popen//python=python tests/worker.py"
"""

import sys


def main() -> None:
    """What execnet has `python -c` do, with a pause before the last line, which serves.

    The lines before it answer: pytest-xdist waits for that before it starts the next worker.
    """
    answer, serve = eval(sys.stdin.readline()).rsplit("\n", 1)
    names = {"__name__": "__main__"}
    exec(answer, names)
    import environment  # noqa: F401
    import warm

    warm.fork_server()
    exec(serve, names)


if __name__ == "__main__":
    main()
