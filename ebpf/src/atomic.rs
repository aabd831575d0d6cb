//! Atomic operations on a word of a map (`BPF_ATOMIC`, Linux 5.12).
//!
//! `core::sync::atomic` does not have these methods for this target, and the linker does not read what the compiler emits
//! for its own intrinsics.
//!
//! *Invariant:* none of this decides anything.

use core::arch::asm;

/// Adds, and gives what was there before.
///
/// # Safety
/// `word` is a word of a map's row.
#[inline(always)]
pub unsafe fn plus(word: *mut u64, mut amount: u64) -> u64 {
    // SAFETY: promised by the caller; words of rows are aligned.
    unsafe {
        asm!("{amount} = atomic_fetch_add((u64 *)({word} + 0), {amount})", word = in(reg) word, amount = inout(reg) amount);
    }
    amount
}

/// Subtracts, and gives what was there before.
///
/// # Safety
/// As for [`plus`].
#[inline(always)]
pub unsafe fn minus(word: *mut u64, amount: u64) -> u64 {
    // SAFETY: as above.
    unsafe { plus(word, amount.wrapping_neg()) }
}

/// Puts something else there, and gives what was there before.
///
/// # Safety
/// As for [`plus`].
#[inline(always)]
pub unsafe fn swap(word: *mut u64, mut new: u64) -> u64 {
    // SAFETY: as above.
    unsafe {
        asm!("{new} = xchg_64({word} + 0, {new})", word = in(reg) word, new = inout(reg) new);
    }
    new
}

/// Compare and exchange: puts `new` in the place of `old`. False where something else was there.
///
/// # Safety
/// As for [`plus`].
#[inline(always)]
pub unsafe fn exchange(word: *mut u64, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: as above; the instruction compares with `r0` and leaves there what it has found.
    unsafe {
        asm!("r0 = cmpxchg_64({word} + 0, r0, {new})", word = in(reg) word, new = in(reg) new, inout("r0") old => found);
    }
    found == old
}
