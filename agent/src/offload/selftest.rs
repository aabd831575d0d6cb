//! stand-in
/// Matrix.
pub struct Matrix;
/// Verdict.
pub enum Verdict {
    /// Kernel.
    Kernel {
        /// Rekey.
        rekey: bool,
    },
    /// User.
    User {
        /// Why.
        why: String,
    },
}
impl Matrix {
    /// V.
    pub fn verdict(&self) -> Verdict {
        Verdict::User { why: String::new() }
    }
}
