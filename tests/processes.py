"""How tests start a module in two processes, on a port of their own."""

import sys

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
