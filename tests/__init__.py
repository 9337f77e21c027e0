"""What must be settled before JAX starts, in pytest's processes and in those that tests start."""

# Tests compile hundreds of small programs and run each a few times: these halve the compiler's
# time, and the programs give the same numbers up to rounding.
_QUICK_TO_COMPILE = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def xla_flags(devices: int) -> str:
    """Return XLA_FLAGS for that many virtual CPU devices."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *_QUICK_TO_COMPILE))
