//! Values with units, as the configuration and the policy write them: `"5s"`, `"1h30m"`; and the network by which peers are
//! counted.
//!
//! A string comes in, a checked value goes out, or an error that says what to write instead.
//!
//! *Invariant:* a number without a unit means nothing, so it is refused rather than guessed.

use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// Longest duration that can be written: ten years.
pub const LONGEST: Duration = Duration::from_secs(3650 * 24 * 60 * 60);

const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// What is wrong with a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant says what it is")]
pub enum InvalidDuration {
    #[error("a duration is missing: write a number and a unit, such as \"30s\"")]
    Empty,
    #[error("the number {number} has no unit: write \"{number}s\" for seconds (units are ms, s, m, h and d)")]
    NoUnit { number: String },
    #[error("`{}` is not a unit of time: write ms, s, m, h or d, such as \"30s\"", .unit.escape_debug())]
    Unit { unit: String },
    #[error("`{}` is not a whole number: write a number and a unit, such as \"30s\" or \"1h30m\"", .found.escape_debug())]
    Number { found: String },
    #[error("the unit `{unit}` is out of order: write each unit once, the largest first, such as \"1h30m\"")]
    Order { unit: String },
    #[error("the duration is longer than ten years: write less")]
    TooLong,
}

/// Parses `"500ms"`, `"5s"`, `"1h30m"`: whole numbers with units, the largest first, each unit once.
pub fn duration(text: &str) -> Result<Duration, InvalidDuration> {
    if text.is_empty() {
        return Err(InvalidDuration::Empty);
    }
    let mut rest = text;
    let mut units = UNITS.iter();
    let mut milliseconds: u64 = 0;
    while !rest.is_empty() {
        let (digits, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
        if digits.is_empty() {
            return Err(InvalidDuration::Number { found: clip(rest) });
        }
        if after.is_empty() {
            return Err(InvalidDuration::NoUnit { number: clip(digits) });
        }
        let (unit, after) = after.split_at(after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len()));
        if !UNITS.iter().any(|(name, _)| *name == unit) {
            return Err(InvalidDuration::Unit { unit: clip(unit) });
        }
        let Some((_, factor)) = units.find(|(name, _)| *name == unit) else {
            return Err(InvalidDuration::Order { unit: unit.into() });
        };
        let part = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
        milliseconds = part.and_then(|part| milliseconds.checked_add(part)).ok_or(InvalidDuration::TooLong)?;
        rest = after;
    }
    let parsed = Duration::from_millis(milliseconds);
    if parsed > LONGEST { Err(InvalidDuration::TooLong) } else { Ok(parsed) }
}

/// Prints a duration the way [`duration`] reads it. Parts below a millisecond are cut off.
pub fn print(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if rest == 0 {
        return "0s".into();
    }
    let mut text = String::new();
    for (unit, factor) in UNITS {
        if rest >= factor {
            text.push_str(&format!("{}{unit}", rest / factor));
            rest %= factor;
        }
    }
    text
}

/// Errors quote what was written, but never much of it.
fn clip(text: &str) -> String {
    text.chars().take(20).collect()
}

/// The network under which an address is counted, since whoever has one address usually has others near it: its /24 or /64,
/// or all of 127.0.0.0/8, which every host has for itself.
pub fn network_of(address: IpAddr) -> IpNet {
    let address = address.to_canonical();
    let length = match address {
        ip if ip.is_ipv4() && ip.is_loopback() => 8,
        IpAddr::V4(_) => 24,
        IpAddr::V6(_) => 64,
    };
    IpNet::new(address, length).map_or_else(|_| address.into(), |network| network.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_have_units() {
        for (text, expected) in [
            ("500ms", Duration::from_millis(500)),
            ("0s", Duration::ZERO),
            ("5s", Duration::from_secs(5)),
            ("1h30m", Duration::from_secs(5400)),
            ("1d2h3m4s5ms", Duration::from_millis(93_784_005)),
        ] {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn wrong_units_say_what_to_write() {
        for (text, expected) in [
            ("", "a duration is missing: write a number and a unit, such as \"30s\""),
            ("5", "the number 5 has no unit: write \"5s\" for seconds (units are ms, s, m, h and d)"),
            ("1h30", "the number 30 has no unit: write \"30s\" for seconds (units are ms, s, m, h and d)"),
            ("5sec", "`sec` is not a unit of time: write ms, s, m, h or d, such as \"30s\""),
            ("5 s", "` s` is not a unit of time: write ms, s, m, h or d, such as \"30s\""),
            ("-5s", "`-5s` is not a whole number: write a number and a unit, such as \"30s\" or \"1h30m\""),
            ("1.5s", "`.` is not a unit of time: write ms, s, m, h or d, such as \"30s\""),
            ("s", "`s` is not a whole number: write a number and a unit, such as \"30s\" or \"1h30m\""),
            ("1m1h", "the unit `h` is out of order: write each unit once, the largest first, such as \"1h30m\""),
            ("1s1s", "the unit `s` is out of order: write each unit once, the largest first, such as \"1h30m\""),
            ("9999999999999999999999d", "the duration is longer than ten years: write less"),
            ("3651d", "the duration is longer than ten years: write less"),
        ] {
            assert_eq!(duration(text).unwrap_err().to_string(), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn print_and_parse_are_inverse(milliseconds in 0u64..=315_360_000_000) {
            let value = Duration::from_millis(milliseconds);
            prop_assert_eq!(duration(&print(value)), Ok(value));
        }

        #[test]
        fn nothing_panics(text in any::<String>(), near in "[0-9]{0,25}[a-z]{0,3}[0-9]{0,3}[a-zµ]{0,3}") {
            let _ = (duration(&text), duration(&near));
        }
    }
}
