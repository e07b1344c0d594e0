"""The two ends of one judged program, in two processes: `serve` runs the program, `check` runs the tests.

The tests never run where the program runs. The checker holds proxies of the program's functions: a call sends plain
values over a socket and receives plain values, and the checker compares them. So nothing that the program does to its
own interpreter (patched builtins, `sys.exit`, a result that equals everything, frames of the caller) affects the
verdict: the program sees neither the expected values nor the pipe of the verdict.

This file runs inside the sandbox and imports the standard library only.
"""

import ast
import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import os
import signal
import sys
import traceback
import types
from contextlib import suppress

FRAME_BYTES = 64 * 2**20  # the longest message that either end accepts
REASON_CHARACTERS = 300
MUTABLE = (list, dict, set, bytearray)
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
MAPPINGS = {kind.__name__: kind for kind in (dict, collections.Counter, collections.OrderedDict)}
# Types whose values are sent as arguments: of the type, or of its `fromisoformat`.
ARGUMENTS = {
    bytes: lambda value: [value.decode("latin-1"), "latin-1"],
    bytearray: lambda value: [value.decode("latin-1"), "latin-1"],
    complex: lambda value: [value.real, value.imag],
    range: lambda value: [value.start, value.stop, value.step],
    decimal.Decimal: lambda value: [str(value)],
    fractions.Fraction: lambda value: [str(value)],
    datetime.timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    datetime.date: lambda value: [value.isoformat()],
    datetime.time: lambda value: [value.isoformat()],
    datetime.datetime: lambda value: [value.isoformat()],
}
CONSTRUCTED = {kind.__name__: getattr(kind, "fromisoformat", kind) for kind in ARGUMENTS}


class ProtocolError(Exception):
    """The other end sent something that is not a message, or a value cannot be sent."""


class ProgramEnded(Exception):
    """The program's process has ended."""


class Values:
    """Converts Python values to JSON and back: plain data by value, everything else as a numbered handle."""

    def __init__(self, to_handle, from_handle):
        self.to_handle, self.from_handle = to_handle, from_handle

    def encode(self, value):
        if value is None or isinstance(value, bool):
            return value
        for base in (str, float, int):
            if isinstance(value, base):
                return base(value)
        if isinstance(value, type):
            known = getattr(builtins, value.__name__, None) is value
            return ["type", value.__name__] if known else ["handle", self.to_handle(value)]
        kind = type(value)
        if isinstance(value, dict):
            tag = kind.__name__ if kind in MAPPINGS.values() else "dict"
            return [tag, [[self.encode(key), self.encode(item)] for key, item in value.items()]]
        if kind is collections.deque:
            return ["deque", [self.encode(item) for item in value], value.maxlen]
        for tag, base in SEQUENCES.items():
            if isinstance(value, base):
                return [tag, [self.encode(item) for item in value]]
        if kind in ARGUMENTS:
            return [kind.__name__, *ARGUMENTS[kind](value)]
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.encode(value.item())
        return ["handle", self.to_handle(value)]

    def decode(self, data):
        if data is None or isinstance(data, bool | int | float | str):
            return data
        try:
            tag, first, *rest = data
            return self.from_handle(first) if tag == "handle" else self._built(tag, first, rest)
        except (TypeError, ValueError, ArithmeticError, KeyError, AttributeError) as error:
            raise ProtocolError(f"not a value: {error}") from None

    def _built(self, tag, first, rest):
        if tag in MAPPINGS:
            return MAPPINGS[tag]({self.decode(key): self.decode(item) for key, item in first})
        if tag == "deque":
            return collections.deque([self.decode(item) for item in first], *rest)
        if tag in SEQUENCES:
            return SEQUENCES[tag]([self.decode(item) for item in first])
        if tag in CONSTRUCTED:
            return CONSTRUCTED[tag](first, *rest)
        if tag == "type" and isinstance(getattr(builtins, first), type):
            return getattr(builtins, first)
        raise ValueError(f"unknown kind {tag!r:.20}")


def send(connection, message):
    data = json.dumps(message).encode()
    if len(data) > FRAME_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes")
    connection.sendall(len(data).to_bytes(4, "big") + data)


def receive(connection):
    size = int.from_bytes(_exactly(connection, 4), "big")
    if size > FRAME_BYTES:
        raise ProtocolError(f"a message of {size} bytes")
    return json.loads(_exactly(connection, size))


def _exactly(connection, size):
    data = bytearray()
    while len(data) < size:
        try:
            part = connection.recv(min(size - len(data), 2**20))
        except OSError:
            part = b""
        if not part:
            raise ProgramEnded
        data += part
    return bytes(data)


# ---------------------------------------------------------------------------------------------- the program's process


def serve(connection, program: str):
    """Runs the program, then answers calls of its functions until the other end hangs up."""
    _unlimited_digits()
    objects = {}

    def to_handle(value):
        objects[id(value)] = value  # which also keeps it alive, and the number its own
        return id(value)

    values = Values(to_handle, objects.__getitem__)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    send(connection, "started")
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        send(connection, {"error": _exception(error)})
        return
    send(connection, {"value": None})
    while True:
        operation, *arguments = receive(connection)
        try:
            answer = _served(operation, arguments, values, module.__dict__)
        except BaseException as error:
            answer = {"error": _exception(error)}
        send(connection, answer)


def _served(operation, arguments, values, namespace):
    if operation == "names":
        found = {name: namespace[name] for name in arguments if name in namespace}
        modules = {name: value.__name__ for name, value in found.items() if isinstance(value, types.ModuleType)}
        rest = {name: values.encode(value) for name, value in found.items() if name not in modules}
        return {"modules": modules, "values": rest}
    target, *decoded = [values.decode(argument) for argument in arguments]
    if operation != "call":
        return {"value": values.encode(OPERATIONS[operation](target, *decoded))}
    positional, keywords = decoded
    before = [json.dumps(values.encode(item)) if isinstance(item, MUTABLE) else None for item in positional]
    result = values.encode(target(*positional, **keywords))
    changed = {}
    for index, (item, was) in enumerate(zip(positional, before, strict=True)):
        if was is not None and json.dumps(now := values.encode(item)) != was:
            changed[index] = now
    return {"value": result, "changed": changed}


OPERATIONS = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "equal": lambda target, other: bool(target == other),
}


def _exception(error):
    return [type(error).__name__, str(error)[:REASON_CHARACTERS]]


# ---------------------------------------------------------------------------------------------- the checker's process


def _asks(operation):
    return lambda self, *arguments: self._checker.value(operation, self, *arguments)


class Remote:
    """Stands for an object of the program, which only other objects of the program can equal."""

    __getattr__, __setattr__, __getitem__ = _asks("getattr"), _asks("setattr"), _asks("getitem")
    __len__, __str__, __repr__ = _asks("len"), _asks("str"), _asks("str")

    def __init__(self, checker, number):
        self.__dict__.update(_checker=checker, _number=number)

    def __call__(self, *positional, **keywords):
        answer = self._checker.ask("call", self, positional, keywords)
        for index, now in answer.get("changed", {}).items():
            _overwrite(positional[int(index)], self._checker.values.decode(now))
        return self._checker.values.decode(answer["value"])

    def __iter__(self):
        iterator = self._checker.value("iter", self)
        while True:
            try:
                item = self._checker.value("next", iterator)
            except StopIteration:
                return
            yield item

    def __bool__(self):
        return self._checker.value("bool", self) is True

    def __eq__(self, other):
        if self is other:
            return True
        return isinstance(other, Remote) and self._checker.value("equal", self, other) is True

    def __hash__(self):
        return hash(self._number)


def _overwrite(argument, now):
    """Changes an argument as the program did, as in a single interpreter."""
    if type(argument) is not type(now):
        raise ProtocolError("an argument changed its type")
    if isinstance(argument, list | bytearray):
        argument[:] = now
    else:
        argument.clear()
        argument.update(now)


def _error(name: str, message: str) -> Exception:
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        with suppress(TypeError):  # some take more than a message
            return known(message)
    return RuntimeError(f"{name}: {message}")


class Checker:
    """Asks the program's process for values on behalf of the tests."""

    def __init__(self, connection):
        self.connection, self.remotes = connection, {}
        self.values = Values(self._number, self._remote)

    def ask(self, operation, *arguments):
        send(self.connection, [operation, *[self.values.encode(argument) for argument in arguments]])
        return self.answer()

    def value(self, operation, *arguments):
        return self.values.decode(self.ask(operation, *arguments).get("value"))

    def names(self, names):
        answer = self.ask("names", *names)
        found = {name: self.values.decode(value) for name, value in answer["values"].items() if name in names}
        modules = {name: module for name, module in answer["modules"].items() if name in names}
        return found | {name: importlib.import_module(module) for name, module in modules.items()}

    def answer(self):
        answer = receive(self.connection)
        if not isinstance(answer, dict):
            raise ProtocolError("no answer")
        if "error" in answer:
            raise _error(*(str(part) for part in answer["error"]))
        return answer

    def _remote(self, number):
        if not isinstance(number, int):
            raise ValueError("a handle must be a number")
        return self.remotes.setdefault(number, Remote(self, number))

    @staticmethod
    def _number(value):
        if isinstance(value, Remote):
            return value._number
        raise ProtocolError(f"the tests hand over a {type(value).__name__}, which cannot be sent to the program")


def check(connection, tests: str, timeout: float, report):
    """Waits for the program, runs the tests against it, reports a verdict and a reason, and ends the process.

    The verdicts are "passed", "failed", "timeout", and "not started" for a fault that is not the program's.
    """
    _unlimited_digits()

    def end(verdict, reason):
        report(verdict, " ".join(reason.split())[:REASON_CHARACTERS])
        os._exit(0)

    try:
        if receive(connection) != "started":
            end("not started", "the sandbox did not start")
    except ProgramEnded:
        end("not started", "the sandbox ended before the program started")
    signal.signal(signal.SIGALRM, lambda *_: end("timeout", f"not finished after {timeout:g} s"))
    signal.setitimer(signal.ITIMER_REAL, timeout)
    checker = Checker(connection)
    try:
        checker.answer()
        code = compile(tests, "<tests>", "exec")
        mentioned = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
        # Builtins stay those of the tests: a program that defines `abs` must not change them.
        namespace = checker.names(sorted(name for name in mentioned if not hasattr(builtins, name)))
        exec(code, namespace | {"__name__": "tests"})
    except ProgramEnded:
        end("failed", "the program's process ended before the tests did")
    except BaseException as error:
        # A failed assert has an empty message; its line says more.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
        line = tests.splitlines()[frames[-1].lineno - 1] if frames else ""
        end("failed", f"{type(error).__name__}: {str(error) or line}")
    end("passed", "passed")


def _unlimited_digits():
    with suppress(AttributeError):  # Python 3.11 and later limit the digits of integers in text
        sys.set_int_max_str_digits(0)
