//! `--tls-cert` and `--tls-key`: PEM files to a configuration of rustls.

use std::{path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
};

/// Files that no TLS server can be made of. It shows paths, never contents.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not PEM.
    #[error("{0}: {1}")]
    File(String, pem::Error),
    /// A file without certificates.
    #[error("{0} holds no certificate")]
    NoCertificate(String),
    /// The key does not belong to the certificate, or is of an unknown kind.
    #[error("certificate and key cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// TLS 1.2 and 1.3 with a chain of certificates (the server's own first) and its private key; clients need no certificate.
///
/// # Errors
/// The files cannot be read or do not fit each other.
pub fn tls_config(certificates: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error| TlsError::File(path, error)
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(certificates)
        .map_err(failed(certificates))?
        .collect::<Result<_, _>>()
        .map_err(failed(certificates))?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate(certificates.display().to_string()));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(failed(key))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
