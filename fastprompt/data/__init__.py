# SPDX-License-Identifier: Apache-2.0
"""Image folders and downloadable assets."""
