# SPDX-License-Identifier: Apache-2.0
"""Published methods as short configurations."""
