"""Calls between two processes: the grader's, which holds the checks, and that of the student's code.

Either side sends a value, a request or the answer to one. A value is a tree of numbers, strings, lists, tensors and

    functions   as a number: calling it sends the arguments back to the side that has it
    iterators   the same, one request for each item
    generators  of random numbers, with their state

so a check calls `heun(denoise, z, ...)` as if it stood beside it, and `heun` calls `denoise` likewise. As in one process,
what the callee changes in place (tensors, lists, generators) is changed for the caller, and gradients pass: of a result
that needs one, backward asks the other side. Nothing is ever unpickled: what a hostile process can send is values.
"""

import builtins
import json
import math
from collections.abc import Iterator

import torch

from ..checks import Stopped

LARGEST = 64 << 20  # bytes of a message
LARGEST_HEADER = 8 << 20  # bytes of its JSON, which takes many times as much when it is read
MOST = 1 << 30  # bytes of all messages of an answer
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128)}


class Lost(Stopped):
    """The other process ended, or does not speak this language."""


class Opaque:
    """A value of a kind that does not travel; a check sees its type's name, and nothing fits it."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<a {self.kind}>"


class Packer:
    """A value -> what JSON takes, and the bytes of its tensors."""

    def __init__(self, link: "Link"):
        self.link, self.bytes, self.size = link, [], 0
        self.mutable: list = []  # tensors, lists and generators, in the order met: the callee may change them
        self.graded: list = []  # tensors that need a gradient

    def pack(self, value):
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < 2**63 else {"opaque": "whole number of more than 64 bits"}
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if kind is list:
            self.mutable.append(value)
            return [self.pack(each) for each in value]
        if isinstance(value, tuple):
            return {"tuple": [self.pack(each) for each in value]}
        if kind is dict:
            return {"dict": [[self.pack(key), self.pack(each)] for key, each in value.items()]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": "cpu"}
        if isinstance(value, torch.Generator):
            self.mutable.append(value)
            state = self.tensor(value.get_state())
            self.mutable.pop()  # the state is no value of its own
            return {"generator": state}
        if kind.__module__ == "numpy":
            return self.pack(torch.as_tensor(value) if kind.__name__ == "ndarray" else value.item())
        if getattr(value, "link", None) is self.link:
            return {"yours": value.number}
        if isinstance(value, Iterator) or callable(value):
            self.link.kept.append(value)
            return {"iterator" if isinstance(value, Iterator) else "function": len(self.link.kept) - 1}
        if isinstance(value, (bool, int, float, str)):  # of a class that inherits from one of these
            return self.pack(next(base(value) for base in (bool, int, float, str) if isinstance(value, base)))
        return {"opaque": kind.__name__[:80]}

    def tensor(self, value: torch.Tensor) -> dict:
        plain = value.detach().to("cpu").contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        needs = value.requires_grad and torch.is_grad_enabled()
        made = {"tensor": str(plain.dtype).removeprefix("torch."), "shape": list(plain.shape), "at": self.size,
                "bytes": len(data), "grad": len(self.graded) if needs else None}
        if needs:
            self.graded.append(value)
        self.mutable.append(value)
        self.bytes.append(data)
        self.size += len(data)
        return made


class Unpacker:
    """The way back. ValueError, TypeError or KeyError for what no Packer has made."""

    def __init__(self, link: "Link", data: bytes):
        self.link, self.data = link, data
        self.mutable: list = []
        self.graded: list = []

    def unpack(self, value):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            made: list = []
            self.mutable.append(made)
            made += [self.unpack(each) for each in value]
            return made
        (kind, what), = [(k, v) for k, v in value.items() if k not in ("shape", "at", "bytes", "grad")]
        if kind == "tensor":
            return self.tensor(value)
        if kind == "float":
            return float({"inf": "inf", "-inf": "-inf"}.get(what, "nan"))
        if kind == "tuple":
            return tuple(self.unpack(each) for each in what)
        if kind == "dict":
            return {self.unpack(key): self.unpack(each) for key, each in what}
        if kind == "dtype":
            return DTYPES[what]
        if kind == "device":
            return torch.device("cpu")
        if kind == "generator":
            made = torch.Generator()
            self.mutable.append(made)
            made.set_state(self.tensor(what))
            self.mutable.pop()
            return made
        if kind == "yours":
            return self.link.kept[what]
        if kind == "function":
            return Function(self.link, int(what))
        if kind == "iterator":
            return RemoteIterator(self.link, int(what))
        return Opaque(str(what))

    def tensor(self, value: dict) -> torch.Tensor:
        dtype, shape = DTYPES[value["tensor"]], [int(n) for n in value["shape"]]
        if len(shape) > 16 or any(not 0 <= n < 2**31 for n in shape) or math.prod(shape) > LARGEST:
            raise ValueError("no shape of a tensor")
        data = self.data[value["at"]: value["at"] + value["bytes"]]
        if len(data) != math.prod(shape) * dtype.itemsize or value["at"] < 0:
            raise ValueError("the bytes do not fit the shape")
        made = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        made = made.reshape(shape)
        if value["grad"] is not None and dtype.is_floating_point:
            made.requires_grad_()
            self.graded.append(made)
        self.mutable.append(made)
        return made


class Function:
    """A function that the other side has."""

    def __init__(self, link: "Link", number: int):
        self.link, self.number = link, number

    def __call__(self, *args, **kwargs):
        return self.link.ask("call", self.number, args, kwargs)


class RemoteIterator(Function):
    """An iterator that the other side has."""

    def __iter__(self):
        return self

    def __next__(self):
        return self.link.ask("next", self.number, (), {})


class Through(torch.autograd.Function):
    """Tensors that the other side computed from `inputs`: backward asks it for their gradients."""

    @staticmethod
    def forward(ctx, link, number, outputs, *inputs):
        ctx.link, ctx.number = link, number
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return (None, None, None, *ctx.link.ask("gradient", ctx.number, tuple(gradients), {}))


def _snapshot(values: list) -> list:
    return [v.detach().clone() if isinstance(v, torch.Tensor) else list(v) if isinstance(v, list) else v.get_state()
            for v in values]


def _same(value, before) -> bool:
    if isinstance(value, list):
        return len(value) == len(before) and all(a is b for a, b in zip(value, before))
    now = value.detach() if isinstance(value, torch.Tensor) else value.get_state()
    return now.shape == before.shape and bool(torch.isclose(now, before, rtol=0, atol=0, equal_nan=True).all())


class Link:
    """One end of the pipe. connection: multiprocessing's, of which only bytes are used."""

    def __init__(self, connection, epitaph=lambda: "its process ended"):
        self.connection = connection
        self.epitaph = epitaph  # says why the other side has gone
        self.kept: list = []  # what the other side may call, by its number
        self.calls: list = []  # (inputs, outputs) of calls whose gradient may be asked for
        self.received = 0  # bytes

    def send(self, message: dict, packer: Packer) -> None:
        header = json.dumps(message, allow_nan=False).encode()
        body = b"".join([len(header).to_bytes(8, "big"), header, *packer.bytes])
        if len(body) > LARGEST:
            raise ValueError(f"a value of more than {LARGEST >> 20} MB")
        self.connection.send_bytes(body)

    def receive(self) -> tuple[dict, bytes]:
        try:
            body = self.connection.recv_bytes(LARGEST)
            end = 8 + int.from_bytes(body[:8], "big")
            self.received += len(body)
            if end > LARGEST_HEADER or self.received > MOST:
                raise Lost("its process answered with more than can be looked at")
            message = json.loads(body[8:end])
            if not isinstance(message, dict):
                raise ValueError("no message")
            return message, body[end:]
        except (EOFError, OSError) as error:
            raise Lost(self.epitaph()) from error
        except (ValueError, RecursionError) as error:
            raise Lost("its process answered with no value") from error

    def ask(self, what: str, number: int, args: tuple, kwargs: dict):
        """Send a request, serve what the other side asks meanwhile, and return its answer, or raise what it raised."""
        packer = Packer(self)
        message = {"do": what, "of": number, "args": [packer.pack(a) for a in args],
                   "kwargs": [[key, packer.pack(value)] for key, value in kwargs.items()]}
        try:
            self.send(message, packer)
        except OSError as error:
            raise Lost(self.epitaph()) from error
        while True:
            answer, data = self.receive()
            if answer.get("do") in ("call", "next", "gradient"):
                self.serve(answer, data)
                continue
            try:
                value, error = self.result(answer, data, packer)
            except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as broken:
                raise Lost("its process answered with no value") from broken
            if error is not None:
                raise error
            return value

    def result(self, answer: dict, data: bytes, packer: Packer) -> tuple[object, Exception | None]:
        """The other side's answer: a value, or what it raised. Tensors, lists and generators it changed are changed here."""
        unpacker = Unpacker(self, data)
        for place, now in answer["changed"]:
            _overwrite(packer.mutable[place], unpacker.unpack(now))
        if answer["do"] == "raise":
            return None, _error(str(answer["kind"]), str(answer["words"])[:500])
        unpacker.graded.clear()
        value = unpacker.unpack(answer["value"])
        if unpacker.graded and packer.graded:
            plain = [each.detach() for each in unpacker.graded]
            joined = Through.apply(self, int(answer["number"]), plain, *packer.graded)
            value = _replaced(value, dict(zip(map(id, unpacker.graded), joined)))
        return value, None

    def serve(self, message: dict, data: bytes) -> None:
        """Do what the other side asks for, and answer."""
        unpacker, packer, before, number = Unpacker(self, data), Packer(self), None, None
        try:
            args = [unpacker.unpack(each) for each in message["args"]]
            kwargs = {str(key): unpacker.unpack(value) for key, value in message["kwargs"]}
            before = _snapshot(unpacker.mutable)
            value = self.do(message["do"], int(message["of"]), args, kwargs)
            packed = packer.pack(value)
            if packer.graded:
                number = len(self.calls)
                self.calls.append((unpacker.graded, packer.graded))
            answer = {"do": "return", "value": packed, "number": number}
        except Lost:
            raise
        except (Exception, SystemExit) as error:
            packer = Packer(self)
            answer = {"do": "raise", "kind": type(error).__name__, "words": str(error)[:500]}
        changed = [] if before is None else [i for i, (v, b) in enumerate(zip(unpacker.mutable, before)) if not _same(v, b)]
        answer["changed"] = [[i, packer.pack(unpacker.mutable[i])] for i in changed]
        try:
            self.send(answer, packer)
        except ValueError as error:  # too large
            self.send({"do": "raise", "kind": "ValueError", "words": str(error), "changed": []}, Packer(self))

    def do(self, what: str, number: int, args: list, kwargs: dict):
        if what == "gradient":
            inputs, outputs = self.calls[number]
            pairs = [(out, grad) for out, grad in zip(outputs, args) if grad is not None]
            results, gradients = zip(*pairs)
            return torch.autograd.grad(results, inputs, gradients, allow_unused=True, retain_graph=True)
        return next(self.kept[number]) if what == "next" else self.kept[number](*args, **kwargs)


def _overwrite(mine, now) -> None:
    """What the callee did in place, done here."""
    if isinstance(mine, list):
        mine[:] = now
    elif isinstance(mine, torch.Generator):
        mine.set_state(now.get_state())
    elif mine.shape != now.shape:
        raise ValueError("a tensor that was given has another shape afterwards")
    else:
        with torch.no_grad():
            mine.copy_(now)


def _replaced(value, by: dict):
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(each, by) for each in value)
    return by.get(id(value), value)


def _error(kind: str, words: str) -> Exception:
    """The exception of that name where Python has it, so that `except ValueError` means the same on both sides."""
    words = "".join(c if c.isprintable() or c == "\n" else " " for c in words)
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception) and "Unicode" not in kind and "Group" not in kind:
        return found(words)  # the others take more than words
    return type(kind if kind.isidentifier() else "Exception", (Exception,), {})(words)
