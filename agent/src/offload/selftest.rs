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

/// stand-in
pub fn run() -> Matrix {
    Matrix
}
impl std::fmt::Display for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stand-in")
    }
}
