"""A temporary folder for sockets and for the files of a rendezvous.

The path of a Unix socket is limited to about a hundred bytes, and a job's TMPDIR may be longer. Not every filesystem supports
sockets. And a rendezvous address is a URL, in which a # is special.
"""

import contextlib
import multiprocessing.util
import re
import socket
import tempfile
from collections.abc import Iterator

from megatron_specialm.base.errors import MachineError

SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
SOCKET_NAME = "x" * 30  # longer than any that multiprocessing makes in its folder
PLAIN = re.compile(r"[\w/.+-]+", re.ASCII)


def short_place() -> str:
    """The temporary folder, or if sockets cannot be made in it, the first usual short folder in which they can.

    Raises:
        MachineError: there is none.
    """
    places = list(dict.fromkeys([*_temporary_folder(), *SHORT_PLACES]))
    for place in places:
        if PLAIN.fullmatch(place) and _holds_sockets(place):
            return place
    raise MachineError(
        f"{', '.join(places)}: in none of these folders can a socket be made: set TMPDIR to a folder with a short name, on a "
        "local disk, that you may write to"
    )


def place_sockets() -> None:
    """Have `multiprocessing` make its sockets in a short folder of this process, which is removed at exit."""
    before, tempfile.tempdir = tempfile.tempdir, short_place()
    try:
        multiprocessing.util.get_temp_dir()  # is made at the first call and then reused
    finally:
        tempfile.tempdir = before


def _temporary_folder() -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):  # neither TMPDIR nor a usual folder is writable
        yield tempfile.gettempdir()


def _holds_sockets(place: str) -> bool:
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=place) as folder:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{folder}/{SOCKET_NAME}")
        return True
    return False
