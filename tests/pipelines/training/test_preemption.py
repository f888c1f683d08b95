import signal
import subprocess
import sys

CODE = (
    "import os, signal, sys\n"
    "from pipelines.training.preemption import catch_sigterm, is_asked_to_end\n"
    "catch_sigterm()\n"
    "assert not is_asked_to_end()\n"
    "os.kill(os.getpid(), signal.SIGTERM)\n"
    "assert is_asked_to_end()\n"
    "print('goes on', flush=True)\n"
    "os.kill(os.getpid(), signal.SIGTERM)\n"
    "print('never', flush=True)\n"
)


def test_the_first_sigterm_is_noted_and_the_second_ends_the_process():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "goes on\n"), done.stderr


def test_a_process_that_never_asked_is_left_alone():
    # in a process of its own: Ray sets a handler in one where a test has called ray.init
    code = (
        "import signal\n"
        "from pipelines.training.preemption import is_asked_to_end\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, is_asked_to_end())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True False\n", done.stderr
