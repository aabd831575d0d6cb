//! What does not work at the moment. No trouble ends the agent: it is logged once, counted, shown, and tried again.
//!
//! *Invariant:* there are as many troubles as there are kinds of [`Work`], however often each fails.

use crate::admin::TroubleStatus;
use crate::intercept::Work;
use std::collections::BTreeMap;
use std::fmt::Display;
use time::OffsetDateTime;

/// Troubles by what fails.
#[derive(Debug, Default)]
pub(super) struct Troubles(BTreeMap<Work, Trouble>);

#[derive(Debug)]
struct Trouble {
    since: OffsetDateTime,
    last: OffsetDateTime,
    count: u64,
    error: String,
}

impl Troubles {
    /// Notes that something failed. Says so in the log when it is new.
    pub fn note(&mut self, work: Work, error: &dyn Display) {
        let (now, error) = (OffsetDateTime::now_utc(), error.to_string());
        match self.0.get_mut(&work) {
            Some(trouble) => {
                trouble.count += 1;
                trouble.last = now;
                trouble.error = error;
            }
            None => {
                let code = work.code();
                tracing::error!(
                    code,
                    error,
                    "{}; it is tried again, and shown in `bunter status` meanwhile",
                    work.means()
                );
                self.0.insert(work, Trouble { since: now, last: now, count: 1, error });
            }
        }
    }

    /// Notes that something was done.
    pub fn over(&mut self, work: Work) {
        if let Some(trouble) = self.0.remove(&work) {
            tracing::info!(code = work.code(), failed = trouble.count, "works again");
        }
    }

    /// Notes what came of something.
    pub fn observe<T>(&mut self, work: Work, outcome: Result<T, impl Display>) -> Option<T> {
        match outcome {
            Ok(done) => {
                self.over(work);
                Some(done)
            }
            Err(error) => {
                self.note(work, &error);
                None
            }
        }
    }

    /// For `bunter status`.
    pub fn status(&self, text: impl Fn(OffsetDateTime) -> String) -> Vec<TroubleStatus> {
        let describe = |(work, trouble): (&Work, &Trouble)| TroubleStatus {
            code: work.code().into(),
            since: text(trouble.since),
            last: text(trouble.last),
            count: trouble.count,
            error: trouble.error.clone(),
            means: work.means().into(),
        };
        self.0.iter().map(describe).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_often_is_one_trouble_with_a_count_until_it_works() {
        let mut troubles = Troubles::default();
        for number in 0..1000 {
            troubles.note(Work::Cgroups, &format!("error {number}"));
        }
        assert_eq!(troubles.observe(Work::Listeners, Err::<(), _>("full")), None);
        let shown = troubles.status(|_| "then".into());
        assert_eq!(shown.len(), 2);
        assert_eq!((shown[0].count, shown[0].error.as_str()), (1000, "error 999"));
        assert_eq!(troubles.observe(Work::Cgroups, Ok::<_, &str>(7)), Some(7));
        assert_eq!(troubles.status(|_| String::new()).len(), 1);
    }
}
