"""Runs the PTX of a kernel in NumPy: for kernels that Triton's interpreter cannot run (inline assembly, Gluon).

All threads of all programs go through the instructions side by side, so branches must be taken by all or by none of
them (loops over a launch argument are; anything else raises). What the hardware leaves undefined raises too: reads and
writes outside of a buffer or at unaligned addresses, registers that nobody wrote, an unknown instruction. Shared memory
belongs to a program; barriers are no-ops, because every instruction is one.

Registers hold raw bits: uint64 arrays [threads], predicates bool.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

import mma_sp_model

SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOAT = {32: np.float32, 64: np.float64}
COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
SHARED_BASE = 1 << 20  # of shared addresses: not zero, so that a forgotten base is noticed


class PTXError(Exception):
    """The kernel did something undefined, or something that is not modelled."""


@dataclass
class Instruction:
    text: str
    opcode: list[str]
    operands: list[str]
    guard: str = ""
    negated: bool = False


@dataclass
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[str]
    shared: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Program:
    """The only entry of ``ptx``."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    head, body = re.search(r"\.entry\s+\S+?\((.*?)\)(.*)", ptx, re.S).groups()
    program = Program([], {}, re.findall(r"\.param\s.*?(\w+)(?:,|\s*$)", head))
    for name in re.findall(r"\.shared\s[^;]*?(\w+)\[\]?", ptx):
        program.shared[name] = SHARED_BASE
    depth, text = 0, body[body.index("{") + 1 :]
    for piece in re.split(r"(?<=[;:])|\n", _joined(text)):
        piece = piece.strip()
        depth += piece == "{"
        if piece == "}":
            if depth == 0:
                break
            depth -= 1
        elif re.match(r"^[$\w]+:$", piece):
            program.labels[piece[:-1]] = len(program.instructions)
        elif piece.endswith(";") and not piece.startswith("."):
            program.instructions.append(_instruction(piece[:-1].strip()))
    return program


def _joined(text: str) -> str:
    """Every instruction on one line; colons inside of opcodes (mma.sp::ordered_metadata) protected."""
    text = text.replace("::", "§")
    lines, held = [], ""
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith((".reg", ".loc", ".pragma", ".maxntid", ".minnctapersm", ".file")):
            continue
        held = f"{held} {line}".strip()
        if held.endswith((";", ":")) or held in ("{", "}"):
            lines.append(held)
            held = ""
    return "\n".join([*lines, held])


def _instruction(text: str) -> Instruction:
    text = text.replace("§", "::")
    found = re.match(r"^(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
    if not found:
        raise PTXError(f"cannot read {text!r}")
    negated, guard, opcode, rest = found.groups()
    operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{\[]+", rest) if part.strip(" ,")]
    return Instruction(text, opcode.split("."), operands, guard or "", bool(negated))


class Machine:
    """One launch: ``grid`` programs of ``warps`` warps."""

    def __init__(self, program: Program, grid: tuple[int, int, int], warps: int, shared: int):
        self.program, self.threads = program, warps * 32
        self.programs = grid[0] * grid[1] * grid[2]
        self.count = self.programs * self.threads
        index = np.arange(self.count, dtype=np.uint64)
        block = index // np.uint64(self.threads)
        x, y = np.uint64(grid[0]), np.uint64(grid[1])
        self.block = block.astype(np.int64)
        self.special = {"%tid.x": index % np.uint64(self.threads), "%ctaid.x": block % x, "%ctaid.y": block // x % y}
        self.special |= {"%ctaid.z": block // (x * y), "%laneid": index % np.uint64(32)}
        self.registers: dict[str, np.ndarray] = {}
        self.parameters: dict[str, int] = {}
        self.buffers: list[np.ndarray] = []
        self.shared = np.zeros((self.programs, max(shared, 1)), np.uint8)
        self.executed = 0

    def run(self, arguments: list, limit: int = 200_000) -> None:
        """``arguments``: NumPy arrays (buffers; written in place) and ints, as many as the kernel has; scratch
        pointers that Triton adds may be left out."""
        for name, argument in zip(self.program.parameters, arguments, strict=False):
            if isinstance(argument, np.ndarray):
                self.buffers.append(argument.reshape(-1).view(np.uint8))
                argument = len(self.buffers) << 40
            self.parameters[name] = int(argument)
        at = 0
        while at < len(self.program.instructions):
            instruction = self.program.instructions[at]
            self.executed += 1
            if self.executed > limit:
                raise PTXError(f"more than {limit} instructions")
            if instruction.opcode[0] in ("ret", "exit") and not instruction.guard:
                return
            try:
                target = self.step(instruction)
            except (PTXError, mma_sp_model.UndefinedBehaviour) as error:
                raise PTXError(f"{instruction.text}: {error}") from error
            at = at + 1 if target is None else self.program.labels[target]

    def step(self, instruction: Instruction) -> str | None:
        """Execute; the label to go on at, or None."""
        active = self.active(instruction)
        opcode, operands = instruction.opcode, instruction.operands
        if opcode[0] == "bra":
            if active is None or active.all():
                return operands[0]
            if active.any():
                raise PTXError("threads take different branches")
            return None
        if opcode[0] in ("bar", "barrier"):
            return None
        if opcode[0] in ("ld", "st"):
            (self.load if opcode[0] == "ld" else self.store)(opcode, operands, active)
        elif opcode[0] in ("ldmatrix", "stmatrix"):
            self.matrices(opcode, operands)
        elif opcode[0] == "mma":
            self.mma(opcode, operands)
        elif opcode[0] == "setp":
            a, b = (self.value(operand, opcode[-1]) for operand in operands[1:3])
            self.write(operands[0], COMPARE[opcode[1]](a, b), active)
        else:
            self.arithmetic(opcode, operands, active)
        return None

    def active(self, instruction: Instruction) -> np.ndarray | None:
        if not instruction.guard:
            return None
        guard = self.registers[instruction.guard]
        return ~guard if instruction.negated else guard

    # Registers and memory

    def raw(self, operand: str) -> np.ndarray:
        """Raw bits of an operand, uint64 [threads] (bool of a predicate)."""
        if operand in self.special:
            return self.special[operand]
        if operand.startswith("%"):
            if operand not in self.registers:
                raise PTXError(f"{operand} was never written")
            return self.registers[operand]
        if operand in self.program.shared:
            return np.full(self.count, self.program.shared[operand], np.uint64)
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", operand):
            return np.full(self.count, int(operand[2:], 16), np.uint64)
        return np.full(self.count, int(operand.rstrip("U"), 0) & (2**64 - 1), np.uint64)

    def value(self, operand: str, kind: str) -> np.ndarray:
        """An operand as numbers of a PTX type: s32, u64, b16, f32, bf16, pred."""
        if kind == "pred":
            return self.raw(operand) if operand.startswith("%") else self.raw(operand) != 0
        bits = self.raw(operand)
        if kind == "bf16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        width = int(kind[1:])
        if kind[0] == "f":
            return bits.astype(UNSIGNED[width]).view(np.float16 if width == 16 else FLOAT[width])
        return bits.astype(UNSIGNED[width]).view(SIGNED[width]) if kind[0] == "s" else bits.astype(UNSIGNED[width])

    def write(self, operand: str, result: np.ndarray, active: np.ndarray | None) -> None:
        """Numbers of any type into a register, for the active threads."""
        if result.dtype != bool:
            width = result.dtype.itemsize * 8
            result = np.ascontiguousarray(result).view(UNSIGNED[width]).astype(np.uint64)
        if active is not None:
            # A register that is only written under a guard is undefined elsewhere; nothing here may rely on it.
            result = np.where(active, result, self.registers.get(operand, np.zeros_like(result)))
        self.registers[operand] = result

    def address(self, operand: str) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        base, _, offset = operand.strip("[] ").partition("+")
        return self.raw(base.strip()) + np.uint64(int(offset or 0) & (2**64 - 1))

    def load(self, opcode: list[str], operands: list[str], active: np.ndarray | None) -> None:
        targets, width = _vector(operands[0]), int(re.sub(r"\D", "", opcode[-1]))
        if opcode[1] == "param":
            name = operands[1].strip("[] ")
            bits = np.full(self.count, self.parameters.get(name, 0) & (2**64 - 1), np.uint64)
            self.write(targets[0], bits.astype(UNSIGNED[width]), active)
            return
        for target, found in zip(
            targets, self.memory(opcode[1], operands[1], width, len(targets), active), strict=True
        ):
            self.write(target, found, active)

    def store(self, opcode: list[str], operands: list[str], active: np.ndarray | None) -> None:
        sources, width = _vector(operands[1]), int(re.sub(r"\D", "", opcode[-1]))
        values = [self.value(source, f"u{width}") for source in sources]
        self.memory(opcode[1], operands[0], width, len(sources), active, values)

    def memory(self, space, operand, width, lanes, active, values=None) -> list[np.ndarray]:
        """Read ``lanes`` consecutive elements a thread, or write ``values``."""
        address = self.address(operand)
        on = np.ones(self.count, bool) if active is None else active
        size = width // 8
        if (address[on] % np.uint64(size * lanes)).any():
            raise PTXError(f"address not a multiple of {size * lanes} bytes")
        out = [np.zeros(self.count, UNSIGNED[width]) for _ in range(lanes)]
        for memory, at, who in self.places(space, address, on, size * lanes):
            view = memory.view(UNSIGNED[width])
            for lane in range(lanes):
                place = (*at[:-1], at[-1] // size + lane)
                if values is None:
                    out[lane][who] = view[place]
                else:
                    view[place] = values[lane][who]
        return out

    def matrices(self, opcode: list[str], operands: list[str]) -> None:
        """8 x 8 matrices of 16 bits: lane 8 i + r has the address of row r of matrix i, lane l holds word l % 4 of row
        l / 4 of every matrix."""
        if "trans" in opcode or opcode[-1] != "b16" or not {"m8n8", "shared"} <= set(opcode):
            raise PTXError("not modelled")
        read = opcode[0] == "ldmatrix"
        names, where = _vector(operands[0] if read else operands[1]), operands[1] if read else operands[0]
        address, lane = self.address(where).reshape(-1, 32), np.arange(32)
        for i, name in enumerate(names):
            rows = np.ascontiguousarray(address[:, 8 * i + lane // 4]).reshape(-1)
            if (rows % np.uint64(16)).any():
                raise PTXError("the address of a row is not a multiple of 16 bytes")
            self.registers["matrix address"] = rows + np.tile(lane % 4 * 4, len(address)).astype(np.uint64)
            found = self.memory("shared", "matrix address", 32, 1, None, None if read else [self.value(name, "u32")])
            if read:
                self.write(name, found[0], None)

    def places(self, space: str, address: np.ndarray, on: np.ndarray, size: int):
        """(memory, index of the first byte, threads) of every buffer that the threads touch."""
        if space == "shared":
            who = np.flatnonzero(on)
            at = address[who].astype(np.int64) - SHARED_BASE
            if len(who) and (at.min() < 0 or at.max() + size > self.shared.shape[1]):
                raise PTXError(f"shared address {at.min()}..{at.max()} of {self.shared.shape[1]}")
            yield self.shared, (self.block[who], at), who
            return
        number = (address >> np.uint64(40)).astype(np.int64)
        for buffer in np.unique(number[on]):
            if not 0 < buffer <= len(self.buffers):
                raise PTXError("address outside of every buffer")
            who = np.flatnonzero(on & (number == buffer))
            at = (address[who] & np.uint64(2**40 - 1)).astype(np.int64)
            if at.max() + size > self.buffers[buffer - 1].size:
                raise PTXError(
                    f"byte {at.max() + size} of argument buffer {buffer} with {self.buffers[buffer - 1].size}"
                )
            yield self.buffers[buffer - 1], (at,), who

    # Instructions

    def mma(self, opcode: list[str], operands: list[str]) -> None:
        shape, kind = opcode[4], opcode[8]
        if shape != "m16n8k32" or "ordered_metadata" not in opcode[1] or opcode[7] != "f32":
            raise PTXError("not modelled")
        d, a, b, c = (_vector(operand) for operand in operands[:4])
        a, b = (self.warps([self.value(name, "u32") for name in names]) for names in (a, b))
        c = self.warps([self.value(name, "f32") for name in c])
        e = self.warps([self.value(operands[4], "u32")])[..., 0]
        result = mma_sp_model.multiply(a, b, c, e, int(operands[5], 0), kind).astype(np.float32)
        for i, name in enumerate(d):
            self.write(name, np.ascontiguousarray(result[..., i]).reshape(-1), None)

    def warps(self, registers: list[np.ndarray]) -> np.ndarray:
        return np.stack(registers, axis=-1).reshape(-1, 32, len(registers))

    def arithmetic(self, opcode: list[str], operands: list[str], active: np.ndarray | None) -> None:
        name, kind = opcode[0], opcode[-1]
        if name == "mov" and ("{" in operands[0] or "{" in operands[1]):
            return self.repack(operands, int(kind[1:]), active)
        if name == "cvt":
            return self.write(operands[0], self.convert(opcode, operands), active)
        if name in ("createpolicy", "prefetch"):
            return self.write(operands[0], np.zeros(self.count, np.uint64), active)
        if name == "selp":
            a, b = self.value(operands[1], kind), self.value(operands[2], kind)
            return self.write(operands[0], np.where(self.registers[operands[3]], a, b), active)
        if name == "shfl":
            return self.write(operands[0], self.shuffle(opcode, operands), active)
        if name == "prmt":
            return self.write(operands[0], self.permute(*(self.value(o, "u32") for o in operands[1:])), active)
        sources = [self.value(operand, kind) for operand in operands[1:]]
        if name in ("shl", "shr", "bfe"):
            sources[1:] = [self.value(operand, "u32") for operand in operands[2:]]
        if name in ("mul", "mad") and opcode[1] == "wide":
            wide = f"{kind[0]}{int(kind[1:]) * 2}"
            sources[:2] = [
                source.astype((SIGNED if kind[0] == "s" else UNSIGNED)[int(wide[1:])]) for source in sources[:2]
            ]
            if name == "mad":
                sources[2] = self.value(operands[3], wide)
        with np.errstate(over="ignore"):
            self.write(operands[0], _compute(name, opcode, sources), active)

    def convert(self, opcode: list[str], operands: list[str]) -> np.ndarray:
        to, source = opcode[-2], opcode[-1]
        values = [self.value(operand, source) for operand in operands[1:]]
        if to in ("bf16", "bf16x2"):
            rounded = [_bfloat16(value) for value in values]
            return rounded[0] if to == "bf16" else rounded[1].astype(np.uint32) | rounded[0].astype(np.uint32) << 16
        if to == "f16x2":
            high, low = (value.astype(np.float16).view(np.uint16).astype(np.uint32) for value in values)
            return low | high << np.uint32(16)
        kind = np.float16 if to == "f16" else {"f": FLOAT, "s": SIGNED}.get(to[0], UNSIGNED)[int(to[1:])]
        return values[0].astype(kind)

    def repack(self, operands: list[str], width: int, active: np.ndarray | None) -> None:
        """mov.b32 {a, b}, c and c, {a, b}."""
        parts = _vector(operands[0] if "{" in operands[0] else operands[1])
        share = width // len(parts)
        if "{" in operands[0]:
            whole = self.raw(operands[1])
            for i, part in enumerate(parts):
                self.write(part, (whole >> np.uint64(i * share)).astype(UNSIGNED[share]), active)
            return
        whole = np.zeros(self.count, np.uint64)
        for i, part in enumerate(parts):
            whole |= self.value(part, f"u{share}").astype(np.uint64) << np.uint64(i * share)
        self.write(operands[0], whole.astype(UNSIGNED[width]), active)

    def shuffle(self, opcode: list[str], operands: list[str]) -> np.ndarray:
        """shfl.sync.bfly.b32 d, a, mask, 31, -1: the register of lane ^ mask."""
        if opcode[2] != "bfly" or int(operands[3], 0) != 31:
            raise PTXError("not modelled")
        lanes = np.arange(32) ^ int(operands[2], 0)
        return np.ascontiguousarray(self.value(operands[1], "u32").reshape(-1, 32)[:, lanes]).reshape(-1)

    def permute(self, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(self.count, np.uint32)
        for i in range(4):
            pick = selector >> np.uint32(4 * i) & np.uint32(15)
            if (pick > 7).any():
                raise PTXError("prmt with sign replication is not modelled")
            byte = (both >> (pick.astype(np.uint64) * np.uint64(8)) & np.uint64(255)).astype(np.uint32)
            out |= byte << np.uint32(8 * i)
        return out


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint64(0x7FFF), rounded).astype(np.uint16)


def _compute(name: str, opcode: list[str], sources: list[np.ndarray]) -> np.ndarray:
    a, b, c = (*sources, None, None)[:3]
    if name in ("shl", "shr"):
        width = a.dtype.itemsize * 8
        amount = np.minimum(b, width - 1).astype(a.dtype)
        shifted = a << amount if name == "shl" else a >> amount
        return shifted if a.dtype.kind == "i" and name == "shr" else np.where(b >= width, a.dtype.type(0), shifted)
    if name in ("mul", "mad") and opcode[1] == "hi":
        raise PTXError("mul.hi is not modelled")
    if name in ("div", "rem"):
        quotient = np.trunc(a / b).astype(a.dtype) if a.dtype.kind == "i" else a // b
        return quotient if name == "div" else a - quotient * b
    if name == "bfe":
        width = np.uint32(a.dtype.itemsize * 8)
        return a << (width - b - c).astype(a.dtype) >> (width - c).astype(a.dtype)
    simple = {
        "mov": lambda: a,
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "mad": lambda: a * b + c,
        "fma": lambda: (a.astype(np.float64) * b + c).astype(a.dtype),
        "and": lambda: a & b,
        "or": lambda: a | b,
        "xor": lambda: a ^ b,
        "not": lambda: ~a,
        "neg": lambda: -a,
        "min": lambda: np.minimum(a, b),
        "max": lambda: np.maximum(a, b),
    }
    if name not in simple:
        raise PTXError("not modelled")
    return simple[name]()
