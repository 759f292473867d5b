//! `mote tenants` and `mote keys`: on a data directory, also while a server runs on it.

use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};

use super::StateArgs;

/// `mote keys`
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: KeysCommand,
}

/// Key management on a data directory.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Create a key and print it, alone, on stdout. The tenant is made when it does not exist.
    Create {
        /// Whose key.
        #[arg(long, value_name = "NAME")]
        tenant: String,
        /// What the key may do.
        #[arg(long, value_enum, default_value_t = RoleArg::Member)]
        role: RoleArg,
        /// How long it works, as `90d`, `12h`, `30m` or `45s` [default: until it is revoked].
        #[arg(long, value_name = "TIME", value_parser = life)]
        expires_in: Option<u64>,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
    /// List keys: id, tenant, role, prefix, state, end, last use. Never the keys themselves.
    List {
        /// Only this tenant's.
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
    /// Revoke a key by id; a running server refuses it within a second.
    Revoke {
        /// The id that `list` shows.
        id: String,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
    /// Create a key in another's place and print it, alone, on stdout; the old one works for a while more.
    Rotate {
        /// The id of the old key, as `list` shows it.
        id: String,
        /// How long the old one still works; `0s` ends it now.
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = grace)]
        grace: u64,
        /// How long the new one works [default: as long as the old one was made to].
        #[arg(long, value_name = "TIME", value_parser = life)]
        expires_in: Option<u64>,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
}

/// A key's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    /// Its tenant's adapters and requests.
    Member,
    /// Tenants, keys, everything.
    Admin,
}

/// `mote tenants`
#[derive(Debug, Args)]
pub struct TenantsArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: TenantsCommand,
}

/// Tenants of a data directory.
#[derive(Debug, Subcommand)]
pub enum TenantsCommand {
    /// List tenants, and what was set for each.
    List {
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
    /// Create a tenant.
    Create {
        /// Its name.
        name: String,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
    /// Set limits of a tenant, and show what is set; a running server honours them within a second. A limit is a number, `unlimited`, or `default` (what
    /// the server was started with).
    Limits {
        /// Whose.
        name: String,
        /// What to set; nothing only shows.
        #[command(flatten)]
        limits: Box<SetLimits>,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
}

/// Limits to set.
#[derive(Debug, Clone, Default, Args)]
pub struct SetLimits {
    /// Adapters.
    #[arg(long, value_name = "LIMIT")]
    pub adapters: Option<LimitChoice>,
    /// Bytes of adapters, files and jobs together.
    #[arg(long, value_name = "LIMIT")]
    pub stored_bytes: Option<LimitChoice>,
    /// Requests at once.
    #[arg(long, value_name = "LIMIT")]
    pub concurrent_requests: Option<LimitChoice>,
    /// Requests a minute.
    #[arg(long, value_name = "LIMIT")]
    pub requests_per_minute: Option<LimitChoice>,
    /// Prompt and completion tokens a minute.
    #[arg(long, value_name = "LIMIT")]
    pub tokens_per_minute: Option<LimitChoice>,
    /// Training jobs that run at once.
    #[arg(long, value_name = "LIMIT")]
    pub running_jobs: Option<LimitChoice>,
    /// Training jobs under way.
    #[arg(long, value_name = "LIMIT")]
    pub queued_jobs: Option<LimitChoice>,
    /// Tokens to train on in a day (UTC).
    #[arg(long, value_name = "LIMIT")]
    pub trained_tokens_per_day: Option<LimitChoice>,
    /// Its share of the engine beside the other tenants': 1 to 1000, or `default` (1).
    #[arg(long, value_name = "N", value_parser = weight)]
    pub weight: Option<LimitChoice>,
}

/// What a limit is set to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitChoice {
    /// What the server was started with.
    Default,
    /// None.
    Unlimited,
    /// At most so many.
    Most(u64),
}

impl FromStr for LimitChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "default" => Ok(Self::Default),
            "unlimited" => Ok(Self::Unlimited),
            number => match number.parse() {
                Ok(most) if most < 1 << 53 => Ok(Self::Most(most)),
                _ => Err("must be a whole number below 2^53, 'unlimited' or 'default'".to_owned()),
            },
        }
    }
}

fn weight(text: &str) -> Result<LimitChoice, String> {
    match text.parse() {
        Ok(choice @ (LimitChoice::Default | LimitChoice::Most(1..=1000))) => Ok(choice),
        _ => Err("must be from 1 to 1000, or 'default'".to_owned()),
    }
}

/// Seconds of `90d`, `12h`, `30m`, `45s`.
fn seconds(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit = match unit {
        "d" => 86_400,
        "h" => 3_600,
        "m" => 60,
        "s" => 1,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn life(text: &str) -> Result<u64, String> {
    let hundred_years = 100 * 366 * 86_400;
    seconds(text)
        .filter(|seconds| (1..=hundred_years).contains(seconds))
        .ok_or_else(|| "must be a time such as 90d, 12h, 30m or 45s, up to a hundred years".to_owned())
}

fn grace(text: &str) -> Result<u64, String> {
    seconds(text)
        .filter(|&seconds| seconds <= 366 * 86_400)
        .ok_or_else(|| "must be a time such as 24h, 30m or 0s, up to a year".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit_and_an_end() {
        assert_eq!(
            (life("90d"), life("12h"), life("30m"), life("45s")),
            (Ok(7_776_000), Ok(43_200), Ok(1_800), Ok(45))
        );
        for text in ["", "d", "90", "0s", "-1d", "1w", "1.5h", "99999999999999999999d", "900000000000000000d", "1ä"] {
            assert!(life(text).is_err(), "{text}");
        }
        assert_eq!(grace("0s"), Ok(0));
        assert!(grace("367d").is_err());
    }

    #[test]
    fn limits_are_numbers_or_words() {
        assert_eq!("7".parse(), Ok(LimitChoice::Most(7)));
        assert_eq!("unlimited".parse(), Ok(LimitChoice::Unlimited));
        for text in ["", "-1", "many", "9007199254740992"] {
            assert!(text.parse::<LimitChoice>().is_err(), "{text}");
        }
        assert_eq!(weight("1000"), Ok(LimitChoice::Most(1000)));
        assert!(weight("0").is_err() && weight("1001").is_err() && weight("unlimited").is_err());
    }
}
