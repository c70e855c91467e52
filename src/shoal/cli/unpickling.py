"""A process that talks to a network must not be able to unpickle: a pickle from outside is a program from outside.

shoal's own code never unpickles (tests/test_no_pickle.py reads every line of it); this hook holds for the libraries
underneath too, in the processes that listen.
"""

from __future__ import annotations

import sys

from shoal.errors import Refused


def refuse_unpickling() -> None:
    """From now on, until this process ends, looking up a class or function for a pickle raises `Refused`.

    Plain values in a pickle (numbers, strings, lists of them) need no lookup and run nothing, so they still load.
    """
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        module, name = arguments
        raise Refused(f"Something tried to unpickle {module}.{name} in a process that listens on a network.")
