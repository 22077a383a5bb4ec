"""The only code that calls collectives."""

from dgc.comm.base import Communicator, Handle, SelfCommunicator
from dgc.comm.runtime import Runtime, init

__all__ = ["Communicator", "Handle", "Runtime", "SelfCommunicator", "init"]
