//! `mote bench`: what to measure.

use std::{num::NonZeroUsize, path::PathBuf, str::FromStr};

use clap::{Args, Subcommand};

use super::{Dtype, EngineArgs, ModelArgs, SyncMode};

/// `mote bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// The measurements.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Tokens a second of the forward pass alone, one row a sequence.
    #[command(args_override_self = true)]
    Decode(Box<DecodeArgs>),
    /// Tokens a second of the forward pass alone, one prompt in one step.
    #[command(args_override_self = true)]
    Prefill(Box<PrefillArgs>),
    /// A server in a child process under n clients: tokens a second, latencies, memory.
    #[command(args_override_self = true)]
    Served(Box<ServedArgs>),
    /// Durable uploads a second, and the first token under an adapter that was just uploaded.
    #[command(args_override_self = true)]
    Upload(Box<UploadArgs>),
    /// Each precision against f32: KL, agreement of the likeliest token, perplexity.
    #[command(args_override_self = true)]
    Quality(Box<QualityArgs>),
    /// Where the time of a step goes, by name.
    #[command(args_override_self = true)]
    Profile(Box<ProfileArgs>),
}

/// Where the figures go, besides the table on stdout.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Report")]
pub struct ReportArgs {
    /// Also write everything, single rounds included, as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// How many adapters a load runs under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterChoice {
    /// The bare base (`none` or `0`).
    Base,
    /// So many, in turn.
    Count(NonZeroUsize),
    /// Each sequence its own (`each`).
    Each,
}

impl AdapterChoice {
    /// How many distinct adapters so many sequences run under.
    pub fn distinct(self, sequences: usize) -> usize {
        match self {
            Self::Base => 0,
            Self::Count(count) => count.get().min(sequences),
            Self::Each => sequences,
        }
    }
}

impl std::fmt::Display for AdapterChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Base => f.write_str("base"),
            Self::Count(count) => write!(f, "{count}"),
            Self::Each => f.write_str("each"),
        }
    }
}

impl FromStr for AdapterChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" | "base" | "0" => Ok(Self::Base),
            "each" => Ok(Self::Each),
            other => other
                .parse()
                .map(Self::Count)
                .map_err(|_| format!("'{other}' is neither a number nor one of none, each")),
        }
    }
}

/// `mote bench decode`
#[derive(Debug, Args)]
pub struct DecodeArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Sequences in a step.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,8,32,64")]
    pub batch: Vec<NonZeroUsize>,
    /// Tokens in the KV cache before the first step.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "64,512")]
    pub context: Vec<NonZeroUsize>,
    /// Distinct adapters: none, a number, or each.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "none")]
    pub adapters: Vec<AdapterChoice>,
    /// Steps in a pass.
    #[arg(long, value_name = "N", default_value = "16")]
    pub steps: NonZeroUsize,
    /// Passes of each case, in turn with the other cases; the median counts.
    #[arg(long, value_name = "N", default_value = "5")]
    pub rounds: NonZeroUsize,
    /// Where the figures go.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// `mote bench prefill`
#[derive(Debug, Args)]
pub struct PrefillArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "128,512")]
    pub tokens: Vec<NonZeroUsize>,
    /// Distinct adapters: none or 1.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "none")]
    pub adapters: Vec<AdapterChoice>,
    /// Passes of each case, in turn with the other cases; the median counts.
    #[arg(long, value_name = "N", default_value = "7")]
    pub rounds: NonZeroUsize,
    /// Where the figures go.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// `mote bench served`
#[derive(Debug, Args)]
pub struct ServedArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The engine. The prefix cache is off whatever is said here.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Clients at once, each on one connection.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,32,64")]
    pub clients: Vec<NonZeroUsize>,
    /// Distinct adapters: 0 (the base), 1 (one for all), a number, or each (one a client). The base is always measured, to be compared with.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "0,1,each")]
    pub adapters: Vec<AdapterChoice>,
    /// Tokens of each prompt; no two prompts are equal.
    #[arg(long, value_name = "N", default_value = "21")]
    pub prompt_tokens: NonZeroUsize,
    /// Tokens of each completion, exactly.
    #[arg(long, value_name = "N", default_value = "32")]
    pub max_tokens: NonZeroUsize,
    /// Requests of each client, one after another, in a round.
    #[arg(long, value_name = "N", default_value = "1")]
    pub requests: NonZeroUsize,
    /// Rounds of each case, in turn with the other cases; the median counts.
    #[arg(long, value_name = "N", default_value = "7")]
    pub rounds: NonZeroUsize,
    /// Rounds with streamed answers, from which the latencies are.
    #[arg(long, value_name = "N", default_value = "3")]
    pub streamed_rounds: usize,
    /// Adapters registered before the load, a server for each number, measured in turn; the largest number of --clients.
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub resident: Vec<NonZeroUsize>,
    /// Also serve the base at this rank, in turn, and report --rank over it.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u8).range(0..=64))]
    pub compare_rank: Option<u8>,
    /// Where the figures go.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// `mote bench upload`
#[derive(Debug, Args)]
pub struct UploadArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What an acknowledged upload survives.
    #[arg(long, value_enum, default_value_t = SyncMode::Normal)]
    pub sync: SyncMode,
    /// Uploads one by one in a round, a request each.
    #[arg(long, value_name = "N", default_value = "2000")]
    pub singles: NonZeroUsize,
    /// Connections of the case with several.
    #[arg(long, value_name = "N", default_value = "16")]
    pub connections: NonZeroUsize,
    /// Adapters of one request to the batch route.
    #[arg(long, value_name = "N", default_value = "100000")]
    pub batch: NonZeroUsize,
    /// Rounds of each case, in turn with the other cases; the median counts.
    #[arg(long, value_name = "N", default_value = "3")]
    pub rounds: NonZeroUsize,
    /// First tokens measured: of the base, of an adapter that was used before, and of one just uploaded, in turn.
    #[arg(long, value_name = "N", default_value = "50")]
    pub first_tokens: NonZeroUsize,
    /// Where the figures go.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// `mote bench quality`
#[derive(Debug, Args)]
#[group(id = "input", required = true, multiple = false, args = ["ids", "text"])]
pub struct QualityArgs {
    /// The model; --dtype says nothing here.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Held-out text as token ids: `{"windows": [[1, 2, ..], ..]}`.
    #[arg(long, value_name = "FILE")]
    pub ids: Option<PathBuf>,
    /// Held-out text, cut into windows of 256 tokens.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// At most so many windows.
    #[arg(long, value_name = "N")]
    pub windows: Option<NonZeroUsize>,
    /// Only these precisions, besides f32 [default: all there are].
    #[arg(long, value_enum, value_name = "DTYPE,..", value_delimiter = ',')]
    pub precisions: Vec<Dtype>,
    /// Where the figures go.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// `mote bench profile`
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Sequences that decode at once.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,32")]
    pub batch: Vec<NonZeroUsize>,
    /// Tokens of the prompt whose prefill is looked at.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "512")]
    pub prefill: Vec<NonZeroUsize>,
    /// Tokens in the KV cache before the first step that is looked at.
    #[arg(long, value_name = "N", default_value = "64")]
    pub context: NonZeroUsize,
    /// Decoding steps looked at.
    #[arg(long, value_name = "N", default_value = "64")]
    pub steps: NonZeroUsize,
    /// Distinct adapters: none, a number, or each.
    #[arg(long, value_name = "N", default_value = "none")]
    pub adapters: AdapterChoice,
    /// How tokens are drawn; 0 takes the likeliest.
    #[arg(long, value_name = "T", default_value = "0")]
    pub temperature: f32,
    /// Prompt tokens in one step.
    #[arg(long, value_name = "N", default_value = "512")]
    pub prefill_chunk: NonZeroUsize,
    /// Where the figures go.
    #[command(flatten)]
    pub report: ReportArgs,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{super::Cli, *};
    use crate::config::Command;

    fn parsed(line: &str) -> Result<BenchCommand, String> {
        let cli = Cli::try_parse_from(line.split(' ')).map_err(|error| error.to_string())?;
        let Command::Bench(args) = cli.command else { return Err("not a bench".into()) };
        Ok(args.command)
    }

    #[test]
    fn adapters_are_a_number_none_or_each() {
        let parse = |text: &str| text.parse::<AdapterChoice>();
        assert_eq!(parse("none"), Ok(AdapterChoice::Base));
        assert_eq!(parse("0"), Ok(AdapterChoice::Base));
        assert_eq!(parse("each").map(|choice| choice.distinct(32)), Ok(32));
        assert_eq!(parse("8").map(|choice| (choice.distinct(32), choice.distinct(4))), Ok((8, 4)));
        assert_eq!(AdapterChoice::Base.distinct(32), 0);
        assert!(parse("many").is_err_and(|message| message.contains("many")));
    }

    #[test]
    fn lists_are_separated_by_commas_and_have_defaults() {
        let Ok(BenchCommand::Served(args)) =
            parsed("mote bench served --clients 1,2 --adapters 0,3,each --resident 1,1000 --rank 2")
        else {
            panic!("not served")
        };
        assert_eq!(args.clients.iter().map(|n| n.get()).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(args.adapters.iter().map(|choice| choice.distinct(9)).collect::<Vec<_>>(), [0, 3, 9]);
        assert_eq!(args.resident.iter().map(|n| n.get()).collect::<Vec<_>>(), [1, 1000]);
        assert_eq!((args.prompt_tokens.get(), args.max_tokens.get(), args.compare_rank), (21, 32, None));
        let Ok(BenchCommand::Decode(args)) = parsed("mote bench decode") else { panic!("not decode") };
        assert_eq!(args.batch.iter().map(|n| n.get()).collect::<Vec<_>>(), [1, 8, 32, 64]);
    }

    #[test]
    fn quality_wants_one_source_and_no_list_holds_a_zero() {
        assert!(parsed("mote bench quality").is_err());
        assert!(parsed("mote bench quality --ids a.json --text b.txt").is_err());
        assert!(parsed("mote bench quality --ids a.json").is_ok());
        assert!(parsed("mote bench decode --batch 0").is_err());
        assert!(parsed("mote bench prefill --tokens 128,x").is_err());
    }
}
