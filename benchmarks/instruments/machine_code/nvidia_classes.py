"""NVIDIA's instructions (SASS) by name."""

from __future__ import annotations

from typing import Literal

# LD and ST are generic, but triton's code has them for global memory only. An atomic counts as a
# store.
GLOBAL_ACCESS: dict[str, Literal["load", "store"]] = {
    **dict.fromkeys(("LDG", "LD", "LDGSTS"), "load"),
    **dict.fromkeys(("STG", "ST", "RED", "REDG", "ATOM", "ATOMG"), "store"),
}
# Modifiers of an access that tell its bits.
BITS = {
    "256": 256,
    "128": 128,
    "64": 64,
    "U16": 16,
    "S16": 16,
    "16": 16,
    "U8": 8,
    "S8": 8,
    "8": 8,
}
# The first whose expression is the whole name; "alu" without one.
KINDS = (
    ("tensor", r"(H|I|D|B|Q|O|F)MMA|(H|I|Q|B)GMMA|UTC\w*MMA"),
    ("fma", r"F(ADD|MUL|FMA)2?|D(ADD|MUL|FMA)|H(ADD|MUL|FMA)2|IMAD|FSWZADD"),
    ("special", r"MUFU"),
    ("conversion", r"F2F|F2I|I2F|I2I|FRND|F2FP|I2FP|F2IP|I2IP"),
    (
        "memory",
        r"LD|ST|LD[GSL]|ST[GSL]|LDGSTS|LDC|LDSM|STSM|SHFL|RED\w*|ATOM\w?|"
        r"UBLK\w+|UTMA\w+|LDT\w*|STT\w*|MATCH|REDUX|CREDUX",
    ),
    (
        "control",
        r"BAR|BRA|BRX|BRXU|JMP|JMX|EXIT|CALL|RET|BSSY|BSYNC|BREAK|WARPSYNC|"
        r"DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|CCTL\w*|SYNCS|ELECT|YIELD|NANOSLEEP|KILL|BPT|"
        r"FENCE|ARRIVES|ACQBULK|PREEXIT|BMOV|VOTE",
    ),
    ("scalar", r"U[A-Z]\w*|R2UR|S2UR|LDCU|VOTEU|CS2UR"),
)
