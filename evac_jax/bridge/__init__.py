"""Between trainer and simulator processes: messages, slots, frames by DLPack."""
