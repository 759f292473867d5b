//! The basis on disk: computed once for a model, read at every later start.
//!
//! One safetensors file a fingerprint and rank, and one tiny file a model file that remembers its fingerprint, so that a start
//! need not read and hash all weights again. It is a cache: it may be deleted at any time, and what is broken is computed anew.

use std::{
    collections::HashMap,
    fmt::Display,
    fs, io,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{
    Basis, BasisError, SiteBasis, Sites,
    basis::{Agreement, check_rank, column},
    fingerprint::{self, CONVENTIONS, hash_text, hash_values},
};
use crate::types::Fingerprint;

/// The folder of cached bases.
#[derive(Debug, Clone)]
pub struct BasisCache {
    folder: PathBuf,
}

/// Which files a model was read from: path, length and modification time of each. The same stamp, the same weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    stamp: blake3::Hash,
}

impl ModelFiles {
    /// Looks at the files.
    ///
    /// # Errors
    /// A file that is not there.
    pub fn of<P: AsRef<Path>>(paths: &[P]) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hash_text(&mut hasher, CONVENTIONS);
        for path in paths {
            let path = fs::canonicalize(path)?;
            let metadata = fs::metadata(&path)?;
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            hash_text(&mut hasher, &path.to_string_lossy());
            hasher.update(&metadata.len().to_le_bytes());
            hasher.update(&modified.as_nanos().to_le_bytes());
        }
        Ok(Self { stamp: hasher.finalize() })
    }
}

/// Where a basis came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Computed now.
    Computed,
    /// Read from the cache after hashing the weights.
    CachedByHash,
    /// Read from the cache; the model's files are those whose weights were hashed before.
    CachedByFile,
}

/// A basis, and what start-up should say about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The basis, of exactly the rank asked for.
    pub basis: Basis,
    /// Where it came from.
    pub origin: Origin,
    /// The worst match with a cached basis of these weights that was recomputed (on request, or for a higher rank): start-up
    /// must say so if it does not [hold](Agreement::holds).
    pub agreement: Option<Agreement>,
}

impl BasisCache {
    /// A cache in this folder, which is made when it is first written to.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The basis of a model: from the cache if it is there and sound, else computed and cached. With `recompute` it is always
    /// computed, and compared with the cached one, which stays: adapters were made for it.
    ///
    /// A cache that cannot be read or written is a warning in the log, never an error.
    ///
    /// # Errors
    /// As [`Basis::compute`].
    pub fn load_or_compute<E: Display>(
        &self,
        sites: &Sites,
        rank: usize,
        files: Option<&ModelFiles>,
        recompute: bool,
        weights: impl Fn(usize) -> Result<Vec<f32>, E> + Sync,
    ) -> Result<Loaded, BasisError> {
        check_rank(sites, rank)?;
        if !recompute && let Some(loaded) = self.lookup(sites, rank, files, &weights)? {
            return Ok(loaded);
        }
        let computed = Basis::compute(sites, rank, &weights)?;
        let cached = self.load_any(sites, computed.fingerprint);
        let agreement = cached.as_ref().and_then(|cached| cached.agreement(&computed));
        self.remember(files, computed.fingerprint);
        match cached {
            Some(cached) if cached.rank >= rank => {
                Ok(Loaded { basis: cached.truncated(rank), origin: Origin::Computed, agreement })
            }
            _ => {
                self.write(&computed);
                Ok(Loaded { basis: computed, origin: Origin::Computed, agreement })
            }
        }
    }

    fn lookup<E: Display>(
        &self,
        sites: &Sites,
        rank: usize,
        files: Option<&ModelFiles>,
        weights: impl Fn(usize) -> Result<Vec<f32>, E> + Sync,
    ) -> Result<Option<Loaded>, BasisError> {
        let found = |basis: Basis, origin| Some(Loaded { basis: basis.truncated(rank), origin, agreement: None });
        if let Some(fingerprint) = files.and_then(|files| self.known_fingerprint(files))
            && let Some(basis) = self.load(sites, fingerprint, rank)
        {
            return Ok(found(basis, Origin::CachedByFile));
        }
        // Hashing reads all weights once more: only worth it if some cached basis could be the one.
        if !self.entries().any(|(_, cached_rank, _)| cached_rank >= rank) {
            return Ok(None);
        }
        let fingerprint = fingerprint::of_weights(sites, weights)?;
        let basis = self.load(sites, fingerprint, rank);
        if basis.is_some() {
            self.remember(files, fingerprint);
        }
        Ok(basis.and_then(|basis| found(basis, Origin::CachedByHash)))
    }

    /// The cached basis of the lowest rank that suffices.
    fn load(&self, sites: &Sites, fingerprint: Fingerprint, rank: usize) -> Option<Basis> {
        let mut candidates: Vec<_> = self
            .entries()
            .filter(|entry| entry.0 == fingerprint && entry.1 >= rank)
            .map(|entry| (entry.1, entry.2))
            .collect();
        candidates.sort();
        candidates.into_iter().find_map(|(rank, path)| {
            let read = fs::read(&path).map_err(|error| error.to_string());
            match read.and_then(|bytes| parse(&bytes, sites, fingerprint, rank)) {
                Ok(basis) => Some(basis),
                Err(message) => {
                    tracing::warn!(path = %path.display(), %message, "cached basis is not usable; it will be computed");
                    None
                }
            }
        })
    }

    /// The cached basis of the highest rank.
    fn load_any(&self, sites: &Sites, fingerprint: Fingerprint) -> Option<Basis> {
        let highest = self.entries().filter(|entry| entry.0 == fingerprint).map(|entry| entry.1).max()?;
        self.load(sites, fingerprint, highest)
    }

    /// Cached files by name.
    fn entries(&self) -> impl Iterator<Item = (Fingerprint, usize, PathBuf)> {
        fs::read_dir(&self.folder).into_iter().flatten().flatten().filter_map(|entry| {
            let path = entry.path();
            let name = path.file_name()?.to_str()?.strip_prefix("basis-")?.strip_suffix(".safetensors")?;
            let (fingerprint, rank) = name.split_once("-r")?;
            Some((fingerprint.parse().ok()?, rank.parse().ok()?, path))
        })
    }

    fn stamp_path(&self, files: &ModelFiles) -> PathBuf {
        self.folder.join(format!("model-{}.fingerprint", &files.stamp.to_hex()[..32]))
    }

    /// The fingerprint of model files that were hashed before and have not changed since.
    pub fn known_fingerprint(&self, files: &ModelFiles) -> Option<Fingerprint> {
        fs::read_to_string(self.stamp_path(files)).ok()?.trim().parse().ok()
    }

    fn remember(&self, files: Option<&ModelFiles>, fingerprint: Fingerprint) {
        if let Some(files) = files {
            self.write_file(&self.stamp_path(files), fingerprint.to_string().as_bytes());
        }
    }

    fn write(&self, basis: &Basis) {
        let path = self.folder.join(format!("basis-{}-r{}.safetensors", basis.fingerprint, basis.rank));
        match render(basis) {
            Ok(bytes) => self.write_file(&path, &bytes),
            Err(error) => tracing::warn!(%error, "the basis cannot be cached"),
        }
    }

    /// Whole or not at all: a temporary file in the same folder, then a rename.
    fn write_file(&self, path: &Path, bytes: &[u8]) {
        let temporary = path.with_extension(format!("tmp{}", std::process::id()));
        let written = fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(&temporary, bytes))
            .and_then(|()| fs::rename(&temporary, path));
        if let Err(error) = written {
            let _ = fs::remove_file(&temporary);
            tracing::warn!(path = %path.display(), %error, "cannot write to the basis cache; the next start computes it again");
        }
    }
}

/// A hash of everything in a basis: a flipped bit on disk would otherwise be an adapter that is slightly wrong.
fn content_hash(basis: &Basis) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(basis.rank as u64).to_le_bytes());
    hasher.update(&basis.fingerprint.0);
    for site in &basis.sites {
        for values in [&site.u, &site.s, &site.v, &vec![site.next_sigma]] {
            hasher.update(&(values.len() as u64).to_le_bytes());
            hash_values(&mut hasher, values);
        }
    }
    hasher.finalize().to_hex().to_string()
}

fn render(basis: &Basis) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let rank = basis.rank;
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::with_capacity(3 * basis.sites.len());
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    for (i, site) in basis.sites.iter().enumerate() {
        let mut s = site.s.clone();
        s.push(site.next_sigma);
        tensors.push((format!("{i}.u"), vec![site.u.len() / rank, rank], bytes(&site.u)));
        tensors.push((format!("{i}.s"), vec![rank + 1], bytes(&s)));
        tensors.push((format!("{i}.v"), vec![site.v.len() / rank, rank], bytes(&site.v)));
    }
    let metadata = HashMap::from([
        ("conventions".to_owned(), CONVENTIONS.to_owned()),
        ("fingerprint".to_owned(), basis.fingerprint.to_string()),
        ("rank".to_owned(), rank.to_string()),
        ("content".to_owned(), content_hash(basis)),
    ]);
    let views: Result<Vec<_>, safetensors::SafeTensorError> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect();
    safetensors::serialize(views?, Some(metadata))
}

/// Reads a cached basis and checks everything about it that can be checked without the weights.
fn parse(bytes: &[u8], sites: &Sites, fingerprint: Fingerprint, rank: usize) -> Result<Basis, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let expect = |key: &str, value: &str| match metadata.get(key) {
        Some(found) if found == value => Ok(()),
        found => Err(format!("{key} is {found:?}, not {value}")),
    };
    expect("conventions", CONVENTIONS)?;
    expect("fingerprint", &fingerprint.to_string())?;
    expect("rank", &rank.to_string())?;
    let read = |name: String, shape: [usize; 2]| -> Result<Vec<f32>, String> {
        let tensor = file.tensor(&name).map_err(|error| error.to_string())?;
        if tensor.dtype() != Dtype::F32 || tensor.shape().iter().product::<usize>() != shape[0] * shape[1] {
            return Err(format!("{name} is {:?} {:?}, not F32 {shape:?}", tensor.dtype(), tensor.shape()));
        }
        Ok(tensor.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    };
    let site = |site: usize| -> Result<SiteBasis, String> {
        let (outputs, inputs) = sites.shape(site);
        let mut s = read(format!("{site}.s"), [1, rank + 1])?;
        let next_sigma = s.pop().unwrap_or_default();
        let basis = SiteBasis {
            u: read(format!("{site}.u"), [outputs, rank])?,
            s,
            v: read(format!("{site}.v"), [inputs, rank])?,
            next_sigma,
        };
        let orthonormal = is_orthonormal(&basis.u, rank) && is_orthonormal(&basis.v, rank);
        let descending = basis.s.is_sorted_by(|a, b| a >= b) && basis.s.iter().all(|s| s.is_finite() && *s >= 0.0);
        if !orthonormal || !descending {
            return Err(format!("{} is not a truncated SVD", sites.module(site)));
        }
        Ok(basis)
    };
    let site_bases: Result<Vec<_>, _> = (0..sites.len()).map(site).collect();
    let basis = Basis { rank, fingerprint, sites: site_bases? };
    expect("content", &content_hash(&basis))?;
    Ok(basis)
}

fn is_orthonormal(values: &[f32], rank: usize) -> bool {
    (0..rank).all(|i| {
        (0..=i).all(|j| {
            let inner: f64 = column(values, rank, i).zip(column(values, rank, j)).map(|(a, b)| a * b).sum();
            (inner - f64::from(u8::from(i == j))).abs() < 1e-4
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::adapter::fixtures::{noise, uniform_sites};

    struct Setup {
        folder: tempfile::TempDir,
        sites: Sites,
        model: PathBuf,
        reads: AtomicUsize,
    }

    impl Setup {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let model = folder.path().join("model.safetensors");
            fs::write(&model, b"weights").unwrap();
            Self { folder, sites: uniform_sites(2, 12, 9), model, reads: AtomicUsize::new(0) }
        }

        /// Loads, and says how often weights were read.
        fn load(&self, rank: usize, recompute: bool) -> (Loaded, usize) {
            self.reads.store(0, Ordering::SeqCst);
            let weights = |site: usize| {
                self.reads.fetch_add(1, Ordering::SeqCst);
                Ok::<_, String>(noise(site as u64, 12 * 9))
            };
            let files = ModelFiles::of(&[&self.model]).unwrap();
            let cache = BasisCache::new(self.folder.path().join("cache"));
            let loaded = cache.load_or_compute(&self.sites, rank, Some(&files), recompute, weights).unwrap();
            (loaded, self.reads.load(Ordering::SeqCst))
        }

        fn basis_file(&self) -> PathBuf {
            let entries = fs::read_dir(self.folder.path().join("cache")).unwrap();
            let mut paths = entries.map(|entry| entry.unwrap().path());
            paths.find(|path| path.extension().is_some_and(|e| e == "safetensors")).unwrap()
        }
    }

    #[test]
    fn computed_once_then_read_without_touching_the_weights() {
        let setup = Setup::new();
        let (first, reads) = setup.load(3, false);
        assert_eq!((first.origin, reads), (Origin::Computed, 14));
        let (again, reads) = setup.load(3, false);
        assert_eq!((again.origin, reads), (Origin::CachedByFile, 0));
        assert_eq!(again.basis, first.basis, "bit for bit");
        let (lower, reads) = setup.load(2, false);
        assert_eq!((lower.origin, reads, lower.basis), (Origin::CachedByFile, 0, first.basis.truncated(2)));
        // The same weights in another file: hashed once, then known.
        fs::rename(&setup.model, setup.folder.path().join("moved")).unwrap();
        fs::write(&setup.model, b"longer weights").unwrap();
        assert_eq!(setup.load(3, false).0.origin, Origin::CachedByHash);
        assert_eq!(setup.load(3, false).0.origin, Origin::CachedByFile);
    }

    #[test]
    fn a_higher_rank_or_a_request_computes_and_compares() {
        let setup = Setup::new();
        assert_eq!(setup.load(2, false).0.agreement, None);
        let (higher, _) = setup.load(4, false);
        assert_eq!(higher.origin, Origin::Computed);
        assert!(higher.agreement.unwrap().holds());
        let (checked, reads) = setup.load(2, true);
        assert!(checked.agreement.unwrap().holds());
        assert_eq!((checked.origin, reads), (Origin::Computed, 14));
    }

    #[test]
    fn a_basis_that_disagrees_is_reported_and_the_cached_one_stays() {
        let setup = Setup::new();
        let (mut loaded, _) = setup.load(2, false);
        let flipped = &mut loaded.basis.sites[5];
        flipped.u.iter_mut().for_each(|x| *x = -*x);
        flipped.v.iter_mut().for_each(|x| *x = -*x);
        fs::write(setup.basis_file(), render(&loaded.basis).unwrap()).unwrap();
        let (checked, _) = setup.load(2, true);
        let agreement = checked.agreement.unwrap();
        assert!(!agreement.holds());
        assert_eq!(agreement.site, 5);
        assert_eq!(checked.basis, loaded.basis);
    }

    #[test]
    fn whatever_is_broken_on_disk_is_computed_anew() {
        let setup = Setup::new();
        let (first, _) = setup.load(2, false);
        let good = fs::read(setup.basis_file()).unwrap();
        for at in [0, 9, 40, good.len() - 5] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(setup.basis_file(), bad).unwrap();
            let (again, _) = setup.load(2, false);
            assert_eq!((again.origin, &again.basis), (Origin::Computed, &first.basis), "byte {at}");
        }
        fs::write(setup.basis_file(), &good[..good.len() / 2]).unwrap();
        assert_eq!(setup.load(2, false).0.origin, Origin::Computed);
        assert_eq!(setup.load(2, false).0.origin, Origin::CachedByFile, "and written again");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let setup = Setup::new();
        fs::write(setup.folder.path().join("cache"), b"a file in the way").unwrap();
        assert_eq!(setup.load(2, false).0.origin, Origin::Computed);
    }
}
