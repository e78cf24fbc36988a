"""Our own decoder and accept length, on the CPU or one GPU: what every engine must agree with."""
