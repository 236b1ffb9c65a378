// SPDX-License-Identifier: Apache-2.0
// Last include of a file of one level: where Clang takes back the target of level.h, or the file does not compile.
#if defined(FASTPROMPT_TARGET) && defined(__clang__)
FASTPROMPT_PRAGMA(clang attribute pop)
#endif
