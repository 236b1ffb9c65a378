# SPDX-License-Identifier: Apache-2.0
"""The operations composed of PyTorch's own CPU kernels; what ``impl="auto"`` uses on a CPU without ``csrc``."""
