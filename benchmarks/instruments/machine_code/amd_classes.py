"""AMD's instructions (GCN) by name."""

from __future__ import annotations

# The last part of an access's name, and its bits.
BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
    "ubyte": 8,
    "sbyte": 8,
    "byte": 8,
}
# The first whose expression is the whole name; "alu" without one.
KINDS = (
    ("tensor", r"v_s?mfma\w+"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+"),
    ("conversion", r"v_cvt_\w+"),
    (
        "fma",
        r"v_(pk_)?(fma|fmac|mac|mad|mul|add|sub|subrev|dot2c?)_"
        r"(legacy_|mix\w*_)?(f|bf)(16|32|64)\w*|"
        r"v_div_(fmas|fixup)_\w+",
    ),
    ("memory", r"(global|buffer|flat|scratch|ds|s_load|s_store|s_buffer|tbuffer)_\w+"),
    (
        "control",
        r"s_(branch|cbranch|barrier|waitcnt|nop|endpgm|sleep|setprio|setpc|swappc|"
        r"sethalt|trap|sendmsg|sched|inst)\w*",
    ),
    ("scalar", r"s_\w+"),
)
