"""Work in a child process that is killed at a chosen operation on files, or at a chosen moment."""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
FAILED, NO_MOUNT = 70, 77
NEW_MOUNTS, PRIVATE = 0x20000, 0x44000
"""Flags of Linux: mounts of this process alone."""


def forked(work):
    """The process that runs a callable and ends; it shares nothing but files with this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks in processes with several threads
        pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def completed(work):
    """Run a callable in a child process to its end; returns its exit status."""
    return _ended(forked(work))


def killed_at_event(work, number):
    """Run a callable that is killed (SIGKILL) at its operation on files of this number.

    Returns:
        Whether it was killed: False if it makes fewer such operations.
    """

    def counted():
        remaining = number

        def hook(event, arguments):
            nonlocal remaining
            if event in FILE_EVENTS and not _only_reads(event, arguments):
                remaining -= 1
                if remaining == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    status = _ended(forked(counted))
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def _only_reads(event, arguments):
    return event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)


def killed_after(work, seconds, number=signal.SIGKILL):
    """Run a callable that is sent a signal after this time; returns its exit status."""
    pid = forked(work)
    time.sleep(seconds)
    os.kill(pid, number)
    return _ended(pid)


def on_small_disk(folder, size, work):
    """Run a callable in a child process for which a folder is a disk of this size in bytes.

    Returns:
        Its exit status; ``NO_MOUNT`` where such a disk cannot be made.
    """

    def inside():
        libc = ctypes.CDLL(None)
        failed = libc.unshare(NEW_MOUNTS) or libc.mount(None, b"/", None, PRIVATE, None)
        options = f"size={size}".encode()
        if failed or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options):
            os._exit(NO_MOUNT)
        work()

    return completed(inside)


def replaced(value, path, new):
    """A nested structure with another value at a path."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def started(command, environment):
    """A command in another process, which Ctrl-C ends even if it is ignored here."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
